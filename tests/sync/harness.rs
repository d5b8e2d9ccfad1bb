//! The test harness itself.

use std::process::Command;
use std::time::Duration;

use crate::common::{Database, cannot_run, eventually};

#[tokio::test]
async fn test_databases_are_separate_and_are_dropped() {
    let (one, two) = tokio::join!(Database::create(), Database::create());
    let client = one.client().await;
    client.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    assert!(two.client().await.batch_execute("TABLE t").await.is_err());
    let gone = one.url();
    drop(one);
    assert!(tokio_postgres::connect(&gone, tokio_postgres::NoTls).await.is_err());
}

#[tokio::test]
async fn a_test_database_is_dropped_when_its_test_panics() {
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
async fn eventually_fails_with_the_name_of_its_condition() {
    eventually("the sea to part", Duration::from_millis(50), async || false).await;
}

#[test]
#[ignore = "run by the test below"]
fn cannot_run_here() {
    cannot_run("the moon is in the way");
}

#[test]
fn a_test_that_cannot_run_is_named_and_fails_if_ci_is_set() {
    for (ci, passes) in [("", true), ("1", false)] {
        let mut itself = Command::new(std::env::current_exe().unwrap());
        itself.args(["--exact", "harness::cannot_run_here", "--ignored"]).env("CI", ci);
        let output = itself.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), passes, "{output:?}");
        assert!(said.contains("NOT RUN: harness::cannot_run_here: the moon is in the way"), "{said}");
    }
}
