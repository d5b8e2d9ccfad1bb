//! Answers of an index that would concern everything, given to one record or to all.

use refarch::double::pinecone::Verb;
use serde_json::{Value, json};
use tokio::process::Child;

use super::{Remote, TIMEOUT, assert_clean, eventually, stop};

/// A table of texts and a note, over a double of Pinecone's.
async fn items() -> (Remote, [Child; 2]) {
    let source = [
        ("REFARCH_SOURCE_TABLE", "public.item"),
        ("REFARCH_SOURCE_TEXT", "title"),
        ("REFARCH_SOURCE_METADATA", "title,note"),
    ];
    let remote = Remote::start(&source).await;
    let table = "CREATE TABLE item (id bigint PRIMARY KEY, title text, note text)";
    remote.database.client().await.batch_execute(table).await.unwrap();
    assert_eq!(remote.run(&["migrate"]).await.0, 0);
    let roles = [remote.spawn(&["listen"]), remote.spawn(&["embed", "--workers", "2"])];
    (remote, roles)
}

async fn letters(remote: &Remote) -> Vec<Value> {
    let said = remote.run(&["redrive", "--json"]).await.1;
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

const NINE: &str = "INSERT INTO item SELECT n, 'a chair of kind ' || n FROM generate_series(1, 9) n";

#[tokio::test(flavor = "multi_thread")]
async fn one_record_refused_by_a_proxy_does_not_hold_other_records() {
    let (remote, roles) = items().await;
    let client = remote.database.client().await;
    remote.double.forbid(|verb, namespace, id| verb == Verb::Upsert && namespace.is_empty() && id == "5");
    client.batch_execute(NINE).await.unwrap();
    remote.drained(9).await;
    let given_up = letters(&remote).await;
    assert_eq!(given_up.len(), 1, "{given_up:?}");
    assert_eq!((&given_up[0]["ids"], &given_up[0]["reason"]), (&json!(["5"]), &json!("refused")));
    assert!(given_up[0]["error"].as_str().unwrap().contains("403"), "{given_up:?}");
    let held: Vec<String> = remote.double.snapshot("").into_keys().collect();
    assert_eq!(held, ["1", "2", "3", "4", "6", "7", "8", "9"], "and nothing that was tried beside them");
    // A record that cannot be fetched is written again.
    remote.double.forbid(|verb, namespace, id| verb == Verb::Fetch && namespace.is_empty() && id == "7");
    client.batch_execute("UPDATE item SET note = 'new' WHERE id = 7").await.unwrap();
    remote.drained(9).await;
    assert_eq!(remote.double.snapshot("")["7"].metadata["note"], "new");
    remote.double.forbid(|_, _, _| false);
    assert_eq!(remote.run(&["redrive", "--all"]).await.0, 0);
    remote.drained(9).await;
    assert_clean(&remote.json(&["verify", "--json"]).await, 9);
    // A record that cannot be deleted stays, and the others do not wait for it.
    remote.double.forbid(|verb, namespace, id| verb == Verb::Delete && namespace.is_empty() && id == "3");
    client.batch_execute("DELETE FROM item WHERE id IN (2, 3, 4)").await.unwrap();
    remote.drained(6).await;
    let given_up = letters(&remote).await;
    assert_eq!((given_up.len(), &given_up[0]["ids"]), (1, &json!(["3"])), "{given_up:?}");
    let held: Vec<String> = remote.double.snapshot("").into_keys().collect();
    assert_eq!(held, ["1", "3", "5", "6", "7", "8", "9"]);
    remote.double.forbid(|_, _, _| false);
    assert_eq!(remote.run(&["redrive", "--all"]).await.0, 0);
    remote.drained(6).await;
    assert_clean(&remote.json(&["verify", "--json"]).await, 6);
    for role in roles {
        stop(role).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_refuses_every_record_is_one_fault_and_no_dead_letter() {
    let (remote, roles) = items().await;
    let client = remote.database.client().await;
    // All else it allows, as with a key that may not write there.
    remote.double.forbid(|verb, namespace, _| verb == Verb::Upsert && namespace.is_empty());
    client.batch_execute(NINE).await.unwrap();
    eventually("the fault to be shown", TIMEOUT, async || {
        let status = remote.status().await;
        assert_eq!(status["dead_letters"], 0, "{status}");
        let faults = status["faults"].as_array().unwrap();
        faults.iter().any(|fault| fault["message"].as_str().unwrap().contains("403"))
    })
    .await;
    let before = remote.double.counts().requests;
    let tried = async || remote.double.counts().requests > before + 12;
    eventually("it to be tried again and again", TIMEOUT, tried).await;
    remote.double.forbid(|_, _, _| false);
    remote.drained(9).await;
    assert_clean(&remote.json(&["verify", "--json"]).await, 9);
    eventually("the fault to be gone", TIMEOUT, async || {
        remote.status().await["faults"].as_array().unwrap().is_empty()
    })
    .await;
    for role in roles {
        stop(role).await;
    }
}
