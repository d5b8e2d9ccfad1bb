use super::*;
use proptest::prelude::*;

fn slice(tokens: u64) -> Slice {
    Slice { batch: Vec::new(), tokens, done: oneshot::channel().0 }
}

#[test]
fn live_goes_first_but_one_in_eight_is_bulk() {
    let mut queues = Queues::default();
    (0..32).for_each(|_| queues.live.push_back(slice(1)));
    (0..32).for_each(|_| queues.bulk.push_back(slice(2)));
    let taken: Vec<u64> = (0..32).map(|_| queues.take().unwrap().tokens).collect();
    assert_eq!(taken[0], 1);
    for eight in taken.chunks(8) {
        assert_eq!(eight.iter().filter(|tokens| **tokens == 2).count(), 1, "{taken:?}");
    }
}

#[test]
fn the_first_timing_replaces_the_guess_and_later_ones_are_smoothed() {
    let clock = Arc::new(crate::pipeline::clock::BootClock);
    let scheduler = EmbedScheduler::new(Arc::new(Noting::default()), Duration::from_secs(1), clock);
    assert_eq!(scheduler.tokens_per_second(), FIRST_GUESS);
    scheduler.record_speed(400, 10_000);
    assert_eq!(scheduler.tokens_per_second(), 40_000);
    scheduler.record_speed(100, 10_000);
    assert_eq!(scheduler.tokens_per_second(), 32_500);
    scheduler.record_speed(100, 0);
    assert_eq!(scheduler.tokens_per_second(), 32_500);
}

/// Notes what it reads, and how many texts come together.
#[derive(Default)]
struct Noting {
    read: Mutex<Vec<Arc<str>>>,
    batches: Mutex<Vec<usize>>,
}

#[async_trait::async_trait]
impl Embedder for Noting {
    fn dimensions(&self) -> usize {
        1
    }

    fn model(&self) -> &'static str {
        "noting"
    }

    fn batch_size(&self) -> BatchSize {
        BatchSize::Bounded { texts: 3, tokens: 10 }
    }

    async fn tokenize(&self, texts: Vec<Arc<str>>) -> Result<Vec<Tokens>> {
        self.read.lock().unwrap().extend(texts.iter().cloned());
        Ok(texts.iter().map(|text| Tokens::Ids(text.bytes().map(u32::from).collect())).collect())
    }

    async fn embed(&self, batch: Vec<Tokens>) -> Result<Vec<Embedding>> {
        self.batches.lock().unwrap().push(batch.len());
        batch.iter().map(|tokens| Ok(Embedding::from([tokens.ids()?.len() as f32]))).collect()
    }
}

#[tokio::test]
async fn each_text_is_read_once_and_goes_in_batches_of_the_embedders_own_size() {
    let embedder = Arc::new(Noting::default());
    let clock = Arc::new(crate::pipeline::clock::BootClock);
    let scheduler = EmbedScheduler::new(Arc::<Noting>::clone(&embedder), Duration::from_secs(1), clock);
    let texts: Vec<Arc<str>> =
        ["eight...", "a", "seven..", "b", "twelve......", "c", "d"].map(Arc::from).to_vec();
    let never = CancellationToken::new();
    let embeddings = tokio::select! {
        embeddings = scheduler.embed(Lane::Bulk, texts.clone()) => embeddings.unwrap(),
        _ = scheduler.work(&never) => unreachable!("it goes on for ever"),
    };
    let lengths: Vec<usize> = embeddings.iter().map(|embedding| embedding[0] as usize).collect();
    assert_eq!(lengths, texts.iter().map(|text| text.len()).collect::<Vec<_>>(), "in the texts' order");
    assert_eq!(*embedder.read.lock().unwrap(), texts);
    assert_eq!(*embedder.batches.lock().unwrap(), [3, 2, 1, 1]);
}

proptest! {
    #[test]
    fn slices_hold_every_text_once_within_the_budget(
        tokens in proptest::collection::vec(1_u64..300, 0..80),
        budget in 1_u64..600,
        least in 1_usize..9,
        more in 0_usize..9,
    ) {
        let order: Vec<(u64, usize)> = tokens.iter().copied().zip(0..).collect();
        let most = least + more;
        let parts = cut(&order, &Bounds { least, most, tokens: budget });
        prop_assert_eq!(parts.concat(), order.clone());
        for (at, part) in parts.iter().enumerate() {
            prop_assert!(part.len() >= least || at + 1 == parts.len());
            prop_assert!(part.len() <= most);
            prop_assert!(part.len() <= least || part.iter().map(|(t, _)| t).sum::<u64>() <= budget);
        }
    }
}
