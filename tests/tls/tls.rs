//! Encrypted connections, against a PostgreSQL that has TLS, and a pooler in transaction mode.
//!
//! Debian's packages, which `scripts/test` installs: the private server's build has no TLS.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::unistd::{Uid, User};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use refarch::backend::postgres::Postgres;
use refarch::config::{Database, Settings};
use refarch::pipeline::failure::{Class, Error};
use refarch::secret::Secret;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::Mutex;

use crate::common;

const PATIENCE: Duration = Duration::from_mins(1);

/// The name that the good certificate is for, which every resolver takes for this machine.
const NAME: &str = "localhost";

/// A program of Debian's server packages. A missing one fails the test: what did not run has shown nothing.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|version| version.path().join("bin").join(name)).collect();
    found.push(Path::new("/usr/sbin").join(name));
    let there = found.into_iter().filter(|path| path.is_file()).max();
    there.unwrap_or_else(|| {
        panic!("{name} is missing: run scripts/test, or install Debian's postgresql and pgbouncer")
    })
}

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
}

/// A server with one of the certificates, or none.
struct Server {
    port: u16,
    child: Child,
    dir: tempfile::TempDir,
}

/// As root, the server must be somebody else.
fn lower(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt as _;
    if Uid::effective().is_root() {
        let user = User::from_name("postgres").unwrap().expect("Debian's package makes the user postgres");
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

fn hand_over(path: &Path) {
    if Uid::effective().is_root() {
        let user = User::from_name("postgres").unwrap().unwrap();
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
}

impl Server {
    async fn start(certificates: &Certificates, certificate: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        hand_over(dir.path());
        let data = dir.path().join("data");
        let made = lower(Command::new(program("initdb")).args(["-D"]).arg(&data))
            .args(["-U", "refarch", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"])
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        let port = common::free_port();
        let mut command = Command::new(program("postgres"));
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", NAME, "-c", "fsync=off"]);
        command.arg("-c").arg(format!("unix_socket_directories={}", dir.path().display()));
        if let Some(name) = certificate {
            for (kind, setting) in [("crt", "ssl_cert_file"), ("key", "ssl_key_file")] {
                let own = dir.path().join(format!("server.{kind}"));
                std::fs::copy(certificates.path(&format!("{name}.{kind}")), &own).unwrap();
                std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600)).unwrap();
                hand_over(&own);
                command.arg("-c").arg(format!("{setting}={}", own.display()));
            }
            command.args(["-c", "ssl=on"]);
        }
        let child = lower(&mut command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { port, child, dir };
        let plain = server.url("sslmode=disable");
        common::eventually("the server to answer", PATIENCE, async || {
            tokio_postgres::connect(&plain, tokio_postgres::NoTls).await.is_ok()
        })
        .await;
        server
    }

    fn url(&self, query: &str) -> String {
        format!("postgres://refarch@{NAME}:{}/postgres?{query}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // At once, and without a checkpoint: nothing of it is kept.
        let data = self.dir.path().join("data");
        let _ = lower(Command::new(program("pg_ctl")).arg("-D").arg(data).args(["-m", "immediate", "stop"]))
            .stdout(Stdio::null())
            .status();
        let _ = self.child.wait();
    }
}

/// What the tests of this process share.
struct Bench {
    certificates: Certificates,
    good: Server,
    named: Server,
    expired: Server,
    plain: Server,
}

static BENCH: Mutex<Weak<Bench>> = Mutex::const_new(Weak::new());

impl Bench {
    async fn shared() -> Arc<Self> {
        let mut shared = BENCH.lock().await;
        if let Some(bench) = shared.upgrade() {
            return bench;
        }
        let certificates = Certificates::make();
        let (good, named, expired, plain) = tokio::join!(
            Server::start(&certificates, Some("good")),
            Server::start(&certificates, Some("named")),
            Server::start(&certificates, Some("expired")),
            Server::start(&certificates, None)
        );
        let bench = Arc::new(Self { certificates, good, named, expired, plain });
        *shared = Arc::downgrade(&bench);
        bench
    }
}

fn settings() -> Database {
    Settings::load(None, &std::collections::BTreeMap::new(), &[]).unwrap().database
}

/// Whether the connection is encrypted, or why there is none.
async fn connect(url: &str, settings: &Database) -> Result<bool, Error> {
    let postgres = Postgres::new(&Secret::new(url), settings)?;
    let client = postgres.client().await?;
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    Ok(client.query_one(sql, &[]).await.unwrap().get(0))
}

/// Server, mode, certificates, and whether the connection is encrypted or what is wrong.
type Case<'a> = (&'a Server, &'a str, Option<&'a str>, Result<bool, &'a str>);

#[tokio::test(flavor = "multi_thread")]
async fn every_mode_asks_what_libpq_asks() {
    let bench = Bench::shared().await;
    let ours = bench.certificates.path("authority.pem");
    let strange = bench.certificates.path("stranger.pem");
    let none: Option<&str> = None;
    let (ours, strange) = (Some(ours.as_str()), Some(strange.as_str()));
    let (good, named, expired, plain) = (&bench.good, &bench.named, &bench.expired, &bench.plain);
    let unknown = "set database.sslrootcert";
    let cases: &[Case] = &[
        (good, "disable", ours, Ok(false)),
        (good, "prefer", none, Ok(true)),
        (good, "require", none, Ok(true)),
        (good, "verify-ca", ours, Ok(true)),
        (good, "verify-full", ours, Ok(true)),
        // Nobody on this machine knows the authority.
        (good, "verify-full", none, Err(unknown)),
        (good, "verify-full", Some("system"), Err(unknown)),
        (good, "verify-ca", strange, Err(unknown)),
        (good, "verify-full", strange, Err(unknown)),
        // With certificates given, they are looked at.
        (good, "require", strange, Err(unknown)),
        (named, "require", none, Ok(true)),
        (named, "verify-ca", ours, Ok(true)),
        (named, "verify-full", ours, Err("elsewhere.example.com")),
        (expired, "prefer", none, Ok(true)),
        (expired, "verify-ca", ours, Err("has expired")),
        (expired, "verify-full", ours, Err("has expired")),
        (plain, "disable", none, Ok(false)),
        (plain, "prefer", none, Ok(false)),
        (plain, "require", none, Err("speaks no TLS")),
        (plain, "verify-full", ours, Err("speaks no TLS")),
    ];
    for (server, mode, root, expected) in cases {
        let root = root.map(|root| format!("&sslrootcert={}", root.replace('/', "%2F"))).unwrap_or_default();
        let url = server.url(&format!("sslmode={mode}{root}"));
        match (connect(&url, &settings()).await, expected) {
            (Ok(encrypted), Ok(wanted)) => assert_eq!(encrypted, *wanted, "{url}"),
            (Err(error), Err(reason)) => {
                assert!(error.to_string().contains(reason), "{url}: {error}");
                assert_eq!(error.class, Class::Fatal, "{url}: {error}");
            }
            (got, _) => panic!("{url}: {got:?}, and not {expected:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_and_pairs_of_keys_do_as_well_as_urls() {
    let bench = Bench::shared().await;
    let set = Database {
        sslmode: "verify-full".into(),
        sslrootcert: bench.certificates.path("authority.pem").into(),
        ..settings()
    };
    let pairs = format!("host={NAME} port={} user=refarch dbname=postgres", bench.good.port);
    assert!(connect(&pairs, &set).await.unwrap());
    assert!(!connect(&format!("{pairs} sslmode='disable'"), &set).await.unwrap(), "the address wins");
    let missing = Database { sslrootcert: "/none.pem".into(), ..set.clone() };
    let error = connect(&pairs, &missing).await.unwrap_err().to_string();
    assert!(error.contains("database.sslrootcert = /none.pem"), "{error}");
    let empty = Database { sslrootcert: bench.certificates.path("empty.pem").into(), ..set };
    let error = connect(&pairs, &empty).await.unwrap_err().to_string();
    assert!(error.contains("there is no certificate in it"), "{error}");
    // This machine needs nothing, unless it is said.
    assert!(!connect(&pairs, &settings()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_work_over_a_verified_connection() {
    let bench = Bench::shared().await;
    let url = bench.good.url("sslmode=verify-full");
    let run = async |args: &[&str]| {
        let mut command = common::refarch();
        command
            .args(args)
            .env("DATABASE_URL", &url)
            .env("PGSSLROOTCERT", bench.certificates.path("authority.pem"));
        // Debian's server has no pgvector.
        command.env("PINECONE_INDEX_HOST", "http://127.0.0.1:9").env("PINECONE_API_KEY", "none");
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["migrate"]).await;
    let (client, connection) =
        tokio_postgres::connect(&bench.good.url("sslmode=disable"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("INSERT INTO products_with_increment (description) VALUES ('a kettle')")
        .await
        .unwrap();
    run(&["listen", "--until-idle"]).await;
    let queued: i64 = client.query_one("SELECT count(*) FROM pgmq.q_refarch_live", &[]).await.unwrap().get(0);
    assert_eq!(queued, 1);
}

/// pgbouncer in transaction mode before a server.
struct Pooler {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Pooler {
    async fn before(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        hand_over(dir.path());
        let port = common::free_port();
        let file = dir.path().join("pgbouncer.ini");
        let settings = format!(
            "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n\
             pool_mode = transaction\nunix_socket_dir =\nignore_startup_parameters = extra_float_digits\n",
            server.dir.path().display(),
            server.port
        )
        .replace("* = host", "postgres = user=refarch host");
        std::fs::write(&file, settings).unwrap();
        let mut command = Command::new(program("pgbouncer"));
        let child = lower(command.arg(&file)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let pooler = Self { child, port, _dir: dir };
        let url = pooler.url();
        common::eventually("the pooler to answer", PATIENCE, async || {
            tokio_postgres::connect(&url, tokio_postgres::NoTls).await.is_ok()
        })
        .await;
        pooler
    }

    fn url(&self) -> String {
        format!("postgres://refarch@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_noticed() {
    let bench = Bench::shared().await;
    let pooler = Pooler::before(&bench.plain).await;
    let direct = bench.plain.url("sslmode=disable");
    let env = [("PINECONE_INDEX_HOST", "http://127.0.0.1:9"), ("PINECONE_API_KEY", "none")];
    let migrated =
        common::refarch().arg("migrate").env("DATABASE_URL", &direct).envs(env).output().await.unwrap();
    assert!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
    // The probe itself: a session of the server's is one, and the pooler's is none.
    let probe = async |url: &str| {
        Postgres::new(&Secret::new(url), &settings()).unwrap().has_sessions().await.unwrap()
    };
    assert!(probe(&direct).await);
    assert!(!probe(&pooler.url()).await);
    // A listener says so once, and goes on by polling.
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
    let line = tokio::time::timeout(PATIENCE, warned).await.expect("no warning came");
    assert!(line.contains("polling"), "{line}");
    child.kill().await.unwrap();
}
