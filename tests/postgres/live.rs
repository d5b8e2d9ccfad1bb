//! A table that only one test uses, and the executable with the settings for this table.

use tokio_postgres::Client;

use crate::common::{self, Database};

/// A database with a table, and the settings that name it.
pub struct Live {
    pub database: Database,
    pub client: Client,
    pub env: Vec<(&'static str, String)>,
}

impl Live {
    /// Runs `setup`, and names `public.articles` in the settings.
    pub async fn new(setup: &str, text: &str, metadata: &str) -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        // Without this, new tables would go into refarch's schema, because the user has the same name.
        client.batch_execute("SET search_path = public").await.unwrap();
        client.batch_execute(setup).await.unwrap();
        let env = vec![
            ("REFARCH_SOURCE_TABLE", "public.articles".to_owned()),
            ("REFARCH_SOURCE_TEXT", text.to_owned()),
            ("REFARCH_SOURCE_METADATA", metadata.to_owned()),
        ];
        Self { database, client, env }
    }

    pub fn set(&mut self, key: &'static str, value: &str) {
        self.env.retain(|(known, _)| *known != key);
        self.env.push((key, value.to_owned()));
    }

    /// The exit code, and what was printed to both streams.
    pub async fn refarch(&self, args: &[&str]) -> (Option<i32>, String) {
        let mut command = self.database.refarch();
        let output = command.args(args).envs(self.env.iter().cloned()).output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    }

    pub async fn done(&self, args: &[&str]) -> String {
        let (code, said) = self.refarch(args).await;
        assert_eq!(code, Some(0), "{args:?}: {said}");
        said
    }

    pub async fn refused(&self, args: &[&str]) -> String {
        let (code, said) = self.refarch(args).await;
        assert_eq!(code, Some(1), "{args:?}: {said}");
        said
    }

    pub async fn sync(&self) {
        self.done(&["listen", "--until-idle"]).await;
        self.done(&["embed", "--until-idle", "--workers", "1"]).await;
    }

    pub async fn run(&self, sql: &str) {
        common::run(&self.client, sql).await;
    }

    pub async fn number(&self, sql: &str) -> i64 {
        common::number(&self.client, sql).await
    }
}
