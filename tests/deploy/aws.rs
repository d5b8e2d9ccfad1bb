//! The stack on AWS: its template, its lints, the names of its variables, and the script over an AWS that is not one. The
//! tests are in Python, beside the tools that they need; their output has the numbers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::common::{self, Database};

fn program(environment: &str, name: &str) -> PathBuf {
    let program = common::runtime_dir().join("runtime").join(environment).join("bin").join(name);
    assert!(program.is_file(), "{} is missing: run scripts/test deploy, which makes it", program.display());
    program
}

/// Runs a file of Python tests.
fn passes(module: &str) {
    let output = Command::new(program("aws", "python"))
        .args(["-m", "unittest", "--verbose", module])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/deploy/aws"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("REFARCH", env!("CARGO_BIN_EXE_refarch"))
        .env("CHECKOV", program("checkov", "checkov"))
        .output()
        .unwrap();
    let (told, said) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}\n{told}");
    println!("{said}{told}");
}

#[test]
fn the_template_holds_what_is_asked_of_it_and_planted_mistakes_are_noticed() {
    passes("test_template");
}

#[test]
fn linters_have_nothing_to_say() {
    passes("test_lints");
}

#[test]
fn refarch_reads_each_variable_of_a_task() {
    passes("test_names");
}

#[test]
fn the_script_goes_from_up_to_down_over_moto() {
    passes("test_deploy");
}

#[tokio::test]
async fn listen_writes_the_metrics_that_scaling_and_alarms_read() {
    let database = Database::create().await;
    let migrated = database.refarch().arg("migrate").output().await.unwrap();
    assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
    let mut command = database.refarch();
    command.arg("listen").env("REFARCH_LOG_EMF", "shop").stdout(Stdio::piped()).stderr(Stdio::null());
    let mut listen = command.spawn().unwrap();
    let mut lines = BufReader::new(listen.stdout.take().unwrap()).lines();
    let line = lines.next_line().await.unwrap().expect("a line of metrics");
    listen.kill().await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let declared = &line["_aws"]["CloudWatchMetrics"][0];
    assert_eq!(declared["Namespace"], "refarch", "{line}");
    assert_eq!(declared["Dimensions"], serde_json::json!([["Deployment"]]), "{line}");
    assert_eq!(line["Deployment"], "shop", "{line}");
    for metric in ["BacklogChanges", "BacklogSeconds", "DeadLetters", "Faults", "ProofOverdue"] {
        assert_eq!(line[metric], 0.0, "{metric}: {line}");
    }
}

#[tokio::test]
async fn the_roles_of_the_services_log_in_and_have_the_rights_that_they_need() {
    let database = Database::create().await;
    let roles = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/roles.sql");
    let refarch = async |args: &[&str]| {
        let mut command = database.refarch();
        command.args(args);
        for name in ["SERVE_PASSWORD", "LISTEN_PASSWORD", "EMBED_PASSWORD"] {
            command.env(name, format!("it's {name}"));
        }
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // Twice: each deployment runs it.
    for _ in 0..2 {
        let said = refarch(&["psql", "-f", roles.to_str().unwrap()]).await;
        assert!(!said.contains("PASSWORD"), "{said}");
    }
    refarch(&["migrate", "--roles", "listen=refarch_listen,embed=refarch_embed,serve=refarch_serve"]).await;
    for (role, password) in
        [("serve", "SERVE_PASSWORD"), ("listen", "LISTEN_PASSWORD"), ("embed", "EMBED_PASSWORD")]
    {
        let url = format!(r"{} user=refarch_{role} password='it\'s {password}'", database.url());
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.query("SELECT count(*) FROM products_with_increment", &[]).await.unwrap();
        let error = client.batch_execute("DROP TABLE products_with_increment").await.unwrap_err();
        assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE), "{role}");
    }
    let owner = database.client().await;
    let all = "refarch_serve, refarch_listen, refarch_embed";
    common::run(&owner, &format!("DROP OWNED BY {all}; DROP ROLE {all}")).await;
}
