//! The threads that embed with a shared model.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use super::model::Model;
use crate::encoder::ExecutionContext;
use crate::pipeline::embedder::{BatchSize, Embedder, Embedding, Tokens};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// What a thread is to embed.
enum Batch {
    Tokens(Vec<Tokens>),
    /// The text of a search. Tokenized by the thread that embeds it: a person waits.
    Query(Arc<str>),
}

impl Batch {
    fn embed(&self, model: &Model, worker: &mut ExecutionContext) -> Result<Vec<Embedding>> {
        match self {
            Self::Tokens(batch) => {
                let sequences = batch.iter().map(Tokens::ids).collect::<Result<Vec<_>>>()?;
                Ok(model.embed(worker, &sequences))
            }
            Self::Query(text) => Ok(model.embed(worker, &[&model.tokenize(text)?])),
        }
    }
}

enum Request {
    Embed {
        batch: Batch,
        answer: oneshot::Sender<Result<Vec<Embedding>>>,
    },
    /// The thread that receives this ends.
    End,
}

/// Embedding threads with a shared model. A drop ends the threads.
pub struct MiniLm {
    model: Arc<Model>,
    requests: mpsc::Sender<Request>,
    receiver: Arc<Mutex<mpsc::Receiver<Request>>>,
    /// Threads that are running and were not told to end.
    threads: Mutex<usize>,
    /// Two threads for one query at a time. Started by the first search.
    queries: OnceLock<mpsc::Sender<Request>>,
}

impl MiniLm {
    /// Starts `threads` threads, each of which embeds one request at a time.
    #[must_use]
    pub fn start(model: Arc<Model>, threads: usize) -> Self {
        let (requests, receiver) = mpsc::channel::<Request>(threads.max(1));
        let receiver = Arc::new(Mutex::new(receiver));
        let minilm = Self { model, requests, receiver, threads: Mutex::new(0), queries: OnceLock::new() };
        minilm.start_up_to(threads.max(1));
        minilm
    }

    /// Starts threads until there are so many.
    fn start_up_to(&self, wanted: usize) {
        let mut threads = self.lock_threads();
        for number in *threads..wanted {
            spawn(&format!("embed-{number}"), &self.model, Model::execution_context, &self.receiver);
        }
        *threads = wanted.max(*threads);
    }

    fn lock_threads(&self) -> MutexGuard<'_, usize> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queries(&self) -> &mpsc::Sender<Request> {
        self.queries.get_or_init(|| {
            let (queries, receiver) = mpsc::channel(1);
            spawn(
                "embed-query",
                &self.model,
                |model| model.encoder.two_threaded_context(),
                &Arc::new(Mutex::new(receiver)),
            );
            queries
        })
    }
}

fn spawn(
    name: &str,
    model: &Arc<Model>,
    start: fn(&Model) -> ExecutionContext,
    receiver: &Arc<Mutex<mpsc::Receiver<Request>>>,
) {
    let (model, receiver) = (Arc::clone(model), Arc::clone(receiver));
    let work = move || serve(&model, start, &receiver);
    if let Err(error) = std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        tracing::error!(%error, name, "cannot start an embedding thread");
    }
}

/// Embeds what comes. A panic fails one request; the thread goes on.
fn serve(model: &Model, start: fn(&Model) -> ExecutionContext, receiver: &Mutex<mpsc::Receiver<Request>>) {
    let mut worker = start(model);
    loop {
        let request = receiver.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Request::Embed { batch, answer }) = request else { return };
        if !answer.is_closed() {
            let embedded = catch_unwind(AssertUnwindSafe(|| batch.embed(model, &mut worker)));
            let result = embedded.unwrap_or_else(|payload| {
                // The memory may be in any state.
                worker = start(model);
                Err(Error::panicked("embed texts", &*payload))
            });
            // The caller may have been cancelled meanwhile.
            let _ = answer.send(result);
        }
    }
}

async fn ask(threads: &mpsc::Sender<Request>, batch: Batch) -> Result<Vec<Embedding>> {
    let gone = || {
        Error::new(
            FailureKind::ProcessBroken,
            "embed texts",
            "the embedding threads have ended: restart the process",
        )
    };
    let (answer, answered) = oneshot::channel();
    threads.send(Request::Embed { batch, answer }).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}

#[async_trait]
impl Embedder for MiniLm {
    fn dimensions(&self) -> usize {
        self.model.description.dimensions
    }

    fn model(&self) -> &str {
        &self.model.description.model
    }

    fn batch_size(&self) -> BatchSize {
        BatchSize::Timed
    }

    async fn resize(&self, at_once: usize) {
        let wanted = at_once.max(1);
        self.start_up_to(wanted);
        let surplus = {
            let mut threads = self.lock_threads();
            std::mem::replace(&mut *threads, wanted) - wanted
        };
        for _ in 0..surplus {
            // Fails only if all threads have ended already.
            let _ = self.requests.send(Request::End).await;
        }
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        let model = Arc::clone(&self.model);
        let tokenize =
            move || texts.iter().map(|text| model.tokenize(text).map(Tokens::Ids)).collect::<Result<_>>();
        tokio::task::spawn_blocking(tokenize).await.map_err(|error| match error.try_into_panic() {
            Ok(payload) => Error::panicked("tokenize texts", &*payload),
            Err(error) => Error::caused(FailureKind::ProcessBroken, "tokenize texts", error),
        })?
    }

    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = ask(self.queries(), Batch::Query(Arc::clone(text))).await?;
        let none = || Error::new(FailureKind::ProcessBroken, "embed a query", "the model returned no vector");
        vectors.pop().ok_or_else(none)
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        ask(&self.requests, Batch::Tokens(batch)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::minilm::model::{ModelOptions, model_dir};

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[tokio::test]
    async fn threads_come_and_go_and_no_text_is_lost() {
        let minilm = MiniLm::start(Arc::new(Model::load(&model_dir(), ModelOptions::default()).unwrap()), 1);
        let texts: Vec<Arc<str>> = (0..8).map(|number| format!("the number {number}").into()).collect();
        let alone = minilm.embed_texts(&texts).await.unwrap();
        for threads in [3, 1, 0, 2] {
            let each = texts.iter().map(|text| minilm.embed_texts(std::slice::from_ref(text)));
            let (embedded, ()) = tokio::join!(futures::future::join_all(each), minilm.resize(threads));
            assert!(embedded.into_iter().map(|one| one.unwrap()[0].clone()).eq(alone.iter().cloned()));
            assert_eq!(*minilm.lock_threads(), threads.max(1));
        }
    }

    #[tokio::test]
    async fn a_panic_fails_one_call_and_no_thread_is_lost() {
        let minilm = MiniLm::start(Arc::new(Model::load(&model_dir(), ModelOptions::default()).unwrap()), 1);
        for _ in 0..2 {
            let unknown = minilm.embed(vec![Tokens::Ids(vec![u32::MAX])]).await.unwrap_err();
            assert_eq!(unknown.kind(), FailureKind::Panicked, "{unknown}");
            assert_eq!(minilm.embed_texts(&["a kettle".into()]).await.unwrap().len(), 1);
        }
    }

    #[tokio::test]
    async fn the_real_model_tells_meanings_apart_and_a_batch_changes_nothing() {
        let model = Arc::new(Model::load(&model_dir(), ModelOptions::default()).unwrap());
        let minilm = MiniLm::start(model, 2);
        assert_eq!((minilm.model(), minilm.dimensions()), ("all-MiniLM-L6-v2/f32", 384));
        let long = "a sentence about gardens and rain, ".repeat(200);
        let texts: Vec<Arc<str>> = [
            "An electric kettle that switches itself off",
            "A device for boiling water with electricity",
            "A history of the Roman senate",
            &long,
            "x",
            "An electric kettle that switches itself off",
        ]
        .map(Arc::from)
        .to_vec();
        let together = minilm.embed_texts(&texts).await.unwrap();
        for (text, vector) in texts.iter().zip(&together) {
            assert!((cosine(vector, vector) - 1.0).abs() < 1e-5);
            assert!(*vector == minilm.embed_texts(std::slice::from_ref(text)).await.unwrap()[0], "{text}");
            assert!(*vector == minilm.embed_query(text).await.unwrap(), "{text}");
        }
        assert!(cosine(&together[0], &together[1]) > 0.6);
        assert!(cosine(&together[0], &together[2]) < 0.2);
        let read = minilm.tokenize(vec![long.into()]).await.unwrap();
        assert_eq!(read.iter().map(Tokens::count).collect::<Vec<_>>(), [256]);
        assert!(minilm.embed_texts(&[]).await.unwrap().is_empty());
    }
}
