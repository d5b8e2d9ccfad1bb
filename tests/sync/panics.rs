//! An embedder that panics.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use refarch::backend::postgres::event;
use refarch::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use refarch::pipeline::failure::Result;
use tokio_util::sync::CancellationToken;

use crate::common::steps::SyncFixture;
use crate::shop::{TABLE, TIMEOUT};

/// Panics when it embeds a text with this word.
const WORD: &str = "volcano";

/// The model's embedder, which panics over some texts, or over all.
struct Panicking {
    inner: Arc<dyn Embedder>,
    over_all: bool,
    /// The texts with [`WORD`] that it has read.
    texts: Mutex<Vec<Tokens>>,
}

#[async_trait]
impl Embedder for Panicking {
    fn dimensions(&self) -> usize {
        self.inner.dimensions()
    }

    fn model(&self) -> &str {
        self.inner.model()
    }

    fn batch_size(&self) -> BatchSize {
        self.inner.batch_size()
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        let tokens = self.inner.tokenize(texts.clone()).await?;
        let with_word = texts.iter().zip(&tokens).filter(|(text, _)| text.contains(WORD));
        self.texts.lock().unwrap().extend(with_word.map(|(_, tokens)| tokens.clone()));
        Ok(tokens)
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        let panics = self.over_all || {
            let texts = self.texts.lock().unwrap();
            batch.iter().any(|tokens| texts.contains(tokens))
        };
        assert!(!panics, "an injected fault");
        self.inner.embed(batch).await
    }
}

async fn fixture(over_all: bool) -> SyncFixture {
    let fixture = SyncFixture::with_embedder("", &[], |inner| {
        Arc::new(Panicking { inner, over_all, texts: Mutex::default() })
    });
    let fixture = fixture.await;
    let texts =
        (1..=5).map(|id| format!("({id}, 'a {} of kind {id}')", if id == 3 { WORD } else { "chair" }));
    let values = texts.collect::<Vec<_>>().join(", ");
    fixture.run(&format!("INSERT INTO {TABLE} (id, description) VALUES {values}")).await;
    fixture.relay().await;
    fixture
}

/// Works until nothing is left, or until the worker cannot go on.
async fn work(fixture: &SyncFixture) -> Result<()> {
    let stop = CancellationToken::new();
    let working = fixture.indexer.run(&stop, &stop, true);
    tokio::time::timeout(TIMEOUT, working).await.expect("it hangs: a worker is lost")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_panics_the_embedder_is_given_up_alone_and_its_worker_starts_again() {
    let fixture = fixture(false).await;
    let mut panics = fixture.indexer.panics();
    work(&fixture).await.unwrap();
    let status = fixture.backends.status().await.unwrap();
    assert_eq!((status.outstanding(), status.dead_letters, status.indexed), (0, 1, Some(4)));
    assert!(fixture.metrics.panics.get() >= 4, "a change is given up at its fourth failure");
    assert_eq!(fixture.indexer.workers(), 1);
    let told = panics.try_recv().unwrap();
    assert!(told.starts_with("an embedding worker ended, and it is started again in 0."), "{told}");
    assert!(told.ends_with("it panicked: an injected fault"), "{told}");
    event::record_panic(&fixture.postgres, "embed-1", &told).await.unwrap();
    let events = event::read(&fixture.postgres, jiff::Timestamp::UNIX_EPOCH, 0, &[]).await.unwrap();
    assert!(events.iter().any(|event| event.kind == "panicked" && event.text == told), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedder_that_always_panics_ends_the_role_and_blames_no_change() {
    let fixture = fixture(true).await;
    let error = work(&fixture).await.unwrap_err();
    assert!(error.is_of_process(), "{error}");
    assert!(error.to_string().contains("panicked 6 times in a row"), "{error}");
    let status = fixture.backends.status().await.unwrap();
    assert_eq!((status.outstanding(), status.dead_letters), (5, 0));
}
