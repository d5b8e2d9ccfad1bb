//! Encrypted connections, against a PostgreSQL that has TLS, and a pooler in transaction mode.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use refarch::backend::postgres::Postgres;
use refarch::config::Database;
use refarch::pipeline::failure::{Class, Error};
use refarch::secret::Secret;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::Mutex;

use crate::common;
use crate::servers::{NAME, Pooler, Server};

const TIMEOUT: Duration = Duration::from_mins(1);

/// Certificates that the tests make.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let authority = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            write(&format!("{name}.pem"), &params.self_signed(&key).unwrap().pem());
            Issuer::new(params, key)
        };
        let ours = authority("authority");
        authority("stranger");
        for (name, host, expired) in
            [("good", NAME, false), ("named", "elsewhere.example.com", false), ("expired", NAME, true)]
        {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            if expired {
                params.not_before = rcgen::date_time_ymd(2020, 1, 1);
                params.not_after = rcgen::date_time_ymd(2021, 1, 1);
            }
            write(&format!("{name}.crt"), &params.signed_by(&key, &ours).unwrap().pem());
            write(&format!("{name}.key"), &key.serialize_pem());
        }
        write("empty.pem", "no certificate\n");
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A server with one of the certificates.
    async fn server(&self, name: &str) -> Server {
        let file = |kind: &str| self.dir.path().join(format!("{name}.{kind}"));
        Server::start(Some([file("crt"), file("key")])).await
    }
}

/// The servers and certificates that the tests of this process share.
struct Fixture {
    certificates: Certificates,
    good: Server,
    named: Server,
    expired: Server,
    plain: Server,
}

static FIXTURE: Mutex<Weak<Fixture>> = Mutex::const_new(Weak::new());

impl Fixture {
    async fn shared() -> Arc<Self> {
        let mut shared = FIXTURE.lock().await;
        if let Some(fixture) = shared.upgrade() {
            return fixture;
        }
        let certificates = Certificates::make();
        let (good, named, expired, plain) = tokio::join!(
            certificates.server("good"),
            certificates.server("named"),
            certificates.server("expired"),
            Server::start(None)
        );
        let fixture = Arc::new(Self { certificates, good, named, expired, plain });
        *shared = Arc::downgrade(&fixture);
        fixture
    }
}

fn settings() -> Database {
    common::source::settings(&[]).database
}

/// Returns whether the connection is encrypted, or why no connection was made.
async fn connect(url: &str, settings: &Database) -> Result<bool, Error> {
    let postgres = Postgres::new(&Secret::new(url), settings)?;
    let client = postgres.client().await?;
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    Ok(client.query_one(sql, &[]).await.unwrap().get(0))
}

/// Server, mode, certificates, and the expected result: whether the connection is encrypted, or a part of the error.
type Case<'a> = (&'a Server, &'a str, Option<&'a str>, Result<bool, &'a str>);

#[tokio::test(flavor = "multi_thread")]
async fn every_sslmode_checks_what_libpq_checks() {
    let fixture = Fixture::shared().await;
    let ours = fixture.certificates.path("authority.pem");
    let strange = fixture.certificates.path("stranger.pem");
    let none: Option<&str> = None;
    let (ours, strange) = (Some(ours.as_str()), Some(strange.as_str()));
    let (good, named, expired, plain) = (&fixture.good, &fixture.named, &fixture.expired, &fixture.plain);
    let unknown = "set database.sslrootcert";
    let cases: &[Case] = &[
        (good, "disable", ours, Ok(false)),
        (good, "prefer", none, Ok(true)),
        (good, "require", none, Ok(true)),
        (good, "verify-ca", ours, Ok(true)),
        (good, "verify-full", ours, Ok(true)),
        // The authority is not among the authorities of this machine.
        (good, "verify-full", none, Err(unknown)),
        (good, "verify-full", Some("system"), Err(unknown)),
        (good, "verify-ca", strange, Err(unknown)),
        (good, "verify-full", strange, Err(unknown)),
        // If the settings name certificates, the server's certificate is checked.
        (good, "require", strange, Err(unknown)),
        (named, "require", none, Ok(true)),
        (named, "verify-ca", ours, Ok(true)),
        (named, "verify-full", ours, Err("elsewhere.example.com")),
        (expired, "prefer", none, Ok(true)),
        (expired, "verify-ca", ours, Err("renew the server's certificate")),
        (expired, "verify-full", ours, Err("renew the server's certificate")),
        (plain, "disable", none, Ok(false)),
        (plain, "prefer", none, Ok(false)),
        (plain, "require", none, Err("does not offer TLS")),
        (plain, "verify-full", ours, Err("does not offer TLS")),
    ];
    for (server, mode, root, expected) in cases {
        let root = root.map(|root| format!("&sslrootcert={}", root.replace('/', "%2F"))).unwrap_or_default();
        let url = server.url(&format!("sslmode={mode}{root}"));
        match (connect(&url, &settings()).await, expected) {
            (Ok(encrypted), Ok(wanted)) => assert_eq!(encrypted, *wanted, "{url}"),
            (Err(error), Err(reason)) => {
                assert!(error.to_string().contains(reason), "{url}: {error}");
                assert_eq!(error.class(), Class::Fatal, "{url}: {error}");
            }
            (got, _) => panic!("{url}: {got:?}, and not {expected:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_options_work_in_settings_key_value_pairs_and_urls() {
    let fixture = Fixture::shared().await;
    let set = Database {
        sslmode: "verify-full".into(),
        sslrootcert: fixture.certificates.path("authority.pem").into(),
        ..settings()
    };
    let pairs = format!("host={NAME} port={} user=refarch dbname=postgres", fixture.good.port);
    assert!(connect(&pairs, &set).await.unwrap());
    assert!(!connect(&format!("{pairs} sslmode='disable'"), &set).await.unwrap(), "the address wins");
    let missing = Database { sslrootcert: "/none.pem".into(), ..set.clone() };
    let error = connect(&pairs, &missing).await.unwrap_err().to_string();
    assert!(error.contains("database.sslrootcert = /none.pem"), "{error}");
    let empty = Database { sslrootcert: fixture.certificates.path("empty.pem").into(), ..set };
    let error = connect(&pairs, &empty).await.unwrap_err().to_string();
    assert!(error.contains("there is no certificate in it"), "{error}");
    // A connection to this machine needs no encryption, unless the settings ask for it.
    assert!(!connect(&pairs, &settings()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_work_over_a_verified_connection() {
    let fixture = Fixture::shared().await;
    let url = fixture.good.url("sslmode=verify-full");
    let run = async |args: &[&str]| {
        let mut command = common::refarch();
        command
            .args(args)
            .env("DATABASE_URL", &url)
            .env("PGSSLROOTCERT", fixture.certificates.path("authority.pem"));
        // Debian's server has no pgvector.
        command.env("PINECONE_INDEX_HOST", "http://127.0.0.1:9").env("PINECONE_API_KEY", "none");
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["migrate"]).await;
    let (client, connection) =
        tokio_postgres::connect(&fixture.good.url("sslmode=disable"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("INSERT INTO products_with_increment (description) VALUES ('a kettle')")
        .await
        .unwrap();
    run(&["listen", "--until-idle"]).await;
    let queued: i64 = client.query_one("SELECT count(*) FROM pgmq.q_refarch_live", &[]).await.unwrap().get(0);
    assert_eq!(queued, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_detected() {
    let fixture = Fixture::shared().await;
    let pooler = Pooler::before(&fixture.plain).await;
    let direct = fixture.plain.url("sslmode=disable");
    let env = [("PINECONE_INDEX_HOST", "http://127.0.0.1:9"), ("PINECONE_API_KEY", "none")];
    let migrated =
        common::refarch().arg("migrate").env("DATABASE_URL", &direct).envs(env).output().await.unwrap();
    assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
    // The probe itself: the server supports sessions, the pooler does not.
    let probe = async |url: &str| {
        Postgres::new(&Secret::new(url), &settings()).unwrap().supports_sessions().await.unwrap()
    };
    assert!(probe(&direct).await);
    assert!(!probe(&pooler.url()).await);
    // The listener logs once that it cannot listen, and polls.
    let mut listen = common::refarch();
    listen.arg("listen").env("DATABASE_URL", pooler.url()).env("REFARCH_DATABASE_POOL_SIZE", "4").envs(env);
    let mut child = listen.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let warned = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("pooler in transaction mode") {
                return line;
            }
        }
        panic!("it ended without a word")
    };
    let line = tokio::time::timeout(TIMEOUT, warned).await.expect("no warning came");
    assert!(line.contains("polling"), "{line}");
    child.kill().await.unwrap();
}
