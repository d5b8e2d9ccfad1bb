//! Rows that a policy hides from the workers.

use super::{ServerBehaviour, TIMEOUT, UnreliableEmbedder, eventually, stop};

#[tokio::test(flavor = "multi_thread")]
async fn rows_hidden_by_a_policy_are_one_fault_until_they_are_visible_again() {
    let moody = UnreliableEmbedder::start(ServerBehaviour::Well).await;
    let role = format!("role_{}", moody.database.name());
    moody.client.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'")).await.unwrap();
    let rights = format!("listen={role},embed={role}");
    assert!(moody.refarch(&["migrate", "--roles", &rights]).status().await.unwrap().success());
    // Of two users in it, the last counts.
    let url = format!("{} user={role} password=secret", moody.database.url());
    let roles =
        ["listen", "embed"].map(|part| moody.refarch(&[part]).env("DATABASE_URL", &url).spawn().unwrap());
    moody.rows(3).await;
    moody.all_applied(3).await;
    let hide = "ALTER TABLE item ENABLE ROW LEVEL SECURITY; ALTER TABLE item FORCE ROW LEVEL SECURITY; \
                CREATE POLICY nobody ON item USING (false); UPDATE item SET title = title || ' again'";
    moody.client.batch_execute(hide).await.unwrap();
    let mut told = String::new();
    eventually("the fault to be told", TIMEOUT, async || {
        let sql = "SELECT string_agg(message, '; ') FROM refarch.fault WHERE kind = 'held'";
        let row = moody.client.query_one(sql, &[]).await.unwrap();
        told = row.get::<_, Option<String>>(0).unwrap_or_default();
        !told.is_empty()
    })
    .await;
    assert!(told.contains("BYPASSRLS") && told.contains("item"), "{told}");
    // Whoever may see the rows sees the fault, too.
    assert_eq!(moody.faults().await.len(), 1);
    assert_eq!((moody.vectors().await, moody.dead().await), (3, 0), "no row was taken for gone");
    moody.client.batch_execute("ALTER TABLE item DISABLE ROW LEVEL SECURITY").await.unwrap();
    moody.all_applied(3).await;
    eventually("the fault to be gone", TIMEOUT, async || moody.kinds().await.is_empty()).await;
    assert!(moody.refarch(&["verify", "--sample", "0"]).status().await.unwrap().success());
    for role in roles {
        stop(role).await;
    }
    let drop = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    moody.client.batch_execute(&drop).await.unwrap();
}
