//! The test harness itself.

use std::time::Duration;

use crate::common::{Database, eventually};

#[tokio::test]
async fn databases_are_apart_and_vanish() {
    let (one, two) = tokio::join!(Database::create(), Database::create());
    let client = one.client().await;
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    assert!(two.client().await.batch_execute("TABLE t").await.is_err());
    let gone = one.url();
    drop(one);
    assert!(tokio_postgres::connect(&gone, tokio_postgres::NoTls).await.is_err());
}

#[tokio::test]
async fn a_database_vanishes_when_its_test_panics() {
    let keeper = Database::create().await;
    let victim = tokio::spawn(async {
        let database = Database::create().await;
        panic!("{}", database.url());
    });
    let url = *victim.await.unwrap_err().into_panic().downcast::<String>().unwrap();
    assert!(tokio_postgres::connect(&url, tokio_postgres::NoTls).await.is_err());
    drop(keeper);
}

#[tokio::test]
#[should_panic(expected = "not within 50ms: the sea to part")]
async fn eventually_says_what_it_waited_for() {
    eventually("the sea to part", Duration::from_millis(50), async || false).await;
}
