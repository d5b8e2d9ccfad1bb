//! Search quality: questions that people ask, and what a right answer must be.
//!
//! The generated catalogue is embedded by the real model and searched exactly, so that what is
//! measured is model and catalogue. `scripts/test index quality:: -- --nocapture` prints the table.

use std::path::Path;
use std::sync::Arc;

use refarch::backend::minilm::{MiniLm, Model, ModelOptions};
use refarch::pipeline::embedder::{Embedder as _, Embedding};
use refarch::role::generate::fake_products::{Attributes, FakeProducts, ProductText};
use refarch::role::generate::vocabulary::Power;

/// Products that are searched; `REFARCH_TEST_PRODUCTS` sets another number.
const PRODUCTS: u64 = 1_500;

/// Answers that are looked at.
const TOP: usize = 10;

/// The least share of right answers, over all questions.
const LEAST: f64 = 0.9;

type Property = fn(&Attributes) -> bool;

fn kind(it: &Attributes, codes: &[&str]) -> bool {
    codes.contains(&it.kind.code)
}

const QUESTIONS: &[(&str, Property)] = &[
    ("products using AI", |it| it.ai.is_some()),
    ("eco-friendly offerings that are electric", |it| it.eco.is_some() && it.power.is_electric()),
    ("smart devices with machine learning", |it| it.ai.is_some()),
    ("a heating control that learns my habits", |it| kind(it, &["THM"])),
    ("solar lights for the garden", |it| kind(it, &["GLT"]) && it.power == Power::Solar),
    ("something to boil water for tea", |it| kind(it, &["KET"])),
    ("gas stove for camping", |it| kind(it, &["STV"]) && it.power == Power::Gas),
    ("toys for young children", |it| kind(it, &["TOY"])),
    ("tool for making holes in a wall", |it| kind(it, &["DRL"])),
    ("how do I keep my lawn short", |it| kind(it, &["MOW"])),
    ("shelter for sleeping outdoors in the rain", |it| kind(it, &["TNT", "SLB"])),
    ("headphones for a noisy open-plan office", |it| kind(it, &["HDP"])),
    ("a chair that is good for my bad back", |it| kind(it, &["CHR"])),
    ("bamboo kitchenware", |it| it.material.contains("bamboo") && kind(it, &["BRD"])),
    ("get rid of dog hair on the carpet", |it| kind(it, &["VAC"])),
    ("help for old people to live independently", |it| kind(it, &["MOB", "BPM"])),
    ("instrument to learn making music", |it| kind(it, &["GTR"])),
    ("keep my dog entertained", |it| kind(it, &["PET"])),
    ("ride to work through the city", |it| kind(it, &["BIK"])),
    ("check my blood pressure at home", |it| kind(it, &["BPM"])),
    ("camera that recognises who is at the door", |it| kind(it, &["CAM"])),
    ("listen to my baby while it sleeps", |it| kind(it, &["BAB"])),
    ("make a good cappuccino", |it| kind(it, &["ESP"])),
    ("keep drinks cold on the beach", |it| kind(it, &["COL"])),
    ("warm clothes for the ski slopes", |it| kind(it, &["JKT"])),
    ("a desk at which I can stand", |it| kind(it, &["DSK"])),
    ("water my plants while I am on holiday", |it| kind(it, &["IRR"])),
    ("charge my phone with sunlight", |it| kind(it, &["CHG"]) && it.power == Power::Solar),
    ("take pictures of wild animals", |it| kind(it, &["PHO"])),
    ("talk to people abroad in their language", |it| kind(it, &["TRL"])),
    ("stainless steel pots and pans", |it| kind(it, &["PAN"]) && it.material == "stainless steel"),
    ("I can't fall asleep", |it| kind(it, &["SLP"])),
    ("clean drinking water from a stream", |it| kind(it, &["WTF"])),
    ("read in bed while my partner sleeps", |it| kind(it, &["RLT"])),
    ("do the laundry", |it| kind(it, &["WSH"])),
    ("exercise at home in winter", |it| kind(it, &["FIT"])),
    ("computer for writing software", |it| kind(it, &["LAP"])),
    ("pollen allergy, need cleaner air", |it| kind(it, &["AIR", "VAC"])),
    ("cut branches off a fruit tree", |it| kind(it, &["PRN"])),
    ("shoes for walking in the mountains", |it| kind(it, &["BOT"])),
];

#[tokio::test(flavor = "multi_thread")]
async fn common_questions_find_the_right_products() {
    let count = std::env::var("REFARCH_TEST_PRODUCTS").map_or(PRODUCTS, |n| n.parse().unwrap());
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".refarch/runtime/model");
    let threads = std::thread::available_parallelism().unwrap().get();
    let minilm =
        Arc::new(MiniLm::start(Arc::new(Model::load(&dir, ModelOptions::default()).unwrap()), threads));

    let fake_products = FakeProducts::new(1);
    let mut text = ProductText::default();
    let (attributes, texts): (Vec<Attributes>, Vec<Arc<str>>) = (0..count)
        .map(|number| (fake_products.product(number, &mut text), Arc::from(text.description.as_str())))
        .unzip();
    let parts = texts.chunks(64).map(|part| {
        let (minilm, part) = (Arc::clone(&minilm), part.to_vec());
        tokio::spawn(async move { minilm.embed_texts(&part).await.unwrap() })
    });
    let vectors: Vec<Embedding> =
        futures::future::join_all(parts).await.into_iter().flat_map(Result::unwrap).collect();

    let mut sum = 0.0;
    for (question, is_right) in QUESTIONS {
        let query = minilm.embed_texts(&[Arc::from(*question)]).await.unwrap().remove(0);
        let score = |vector: &Embedding| vector.iter().zip(query.iter()).map(|(a, b)| a * b).sum::<f32>();
        let mut ranked: Vec<(f32, usize)> = vectors.iter().map(score).zip(0..).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        let right = ranked[..TOP].iter().filter(|(_, at)| is_right(&attributes[*at])).count();
        sum += right as f64 / TOP as f64;
        println!("{:>3} %  {question}", right * 100 / TOP);
        for (score, at) in ranked[..TOP].iter().filter(|(_, at)| !is_right(&attributes[*at])).take(2) {
            println!("         {score:.2} not: {}", texts[*at]);
        }
    }
    let share = sum / QUESTIONS.len() as f64;
    println!(
        "{:.1} % of the first {TOP} answers to {} questions are right, among {count} products",
        share * 100.0,
        QUESTIONS.len()
    );
    assert!(share >= LEAST, "{share:.3} of the answers are right");
}
