//! The private cluster: many processes join it, the last one stops it, and it recovers from crashes and damaged files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use refarch::backend::embedded::{Cluster, ClusterOptions};
use tempfile::TempDir;

use crate::common::{self, cannot_run, connect, eventually, refarch};

const SOON: Duration = Duration::from_secs(20);

/// A runtime folder that only one test uses, with the crate's PostgreSQL binaries.
struct ClusterFolder {
    _parent: TempDir,
    dir: PathBuf,
}

impl ClusterFolder {
    fn new() -> Self {
        Self::within("project", 0o755)
    }

    fn within(name: &str, mode: u32) -> Self {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join(name).join(".refarch");
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::symlink(common::runtime_dir().join("runtime"), dir.join("runtime")).unwrap();
        Self { _parent: parent, dir }
    }

    fn options(&self) -> ClusterOptions {
        // The tests kill servers, but not the machine, so data need not reach the disk.
        let extra = vec![("fsync".to_owned(), "off".to_owned())];
        ClusterOptions { extra, ..ClusterOptions::in_runtime_dir(&self.dir) }
    }

    async fn join(&self) -> anyhow::Result<Cluster> {
        Cluster::join(self.options()).await
    }

    /// Checks that joining fails. Returns the error.
    async fn refusal(&self) -> String {
        format!("{:#}", self.join().await.unwrap_err())
    }

    /// Another process, which joins, runs some SQL and leaves.
    fn psql(&self, sql: &str) -> tokio::process::Command {
        let mut command = refarch();
        command.env("REFARCH_RUNTIME_DIR", &self.dir).args(["psql", "-XAtc", sql]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command
    }

    /// The folder of the server's files.
    fn files(&self) -> PathBuf {
        let dir = self.dir.join("postgres");
        fs::read_to_string(dir.join("location")).map_or(dir, PathBuf::from)
    }

    fn pid_file(&self) -> PathBuf {
        self.files().join("data/postmaster.pid")
    }

    fn server(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.pid_file()).ok()?;
        Some(Pid::from_raw(text.lines().next()?.parse().ok()?))
    }

    fn assert_stopped(&self) {
        assert_eq!(self.server(), None, "a server is left running");
    }
}

impl Drop for ClusterFolder {
    fn drop(&mut self) {
        // A failed test must not leave its server behind.
        if let Some(pid) = self.server() {
            let _ = kill(pid, Signal::SIGQUIT);
        }
        if self.files().starts_with("/var/lib/refarch") {
            let _ = fs::remove_dir_all(self.files());
        }
    }
}

async fn answer(cluster: &Cluster, sql: &str) -> String {
    connect(cluster.url().expose()).await.query_one(sql, &[]).await.unwrap().get(0)
}

const IDENTITY: &str = "SELECT system_identifier::text FROM pg_control_system()";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_users_start_one_server_and_the_last_one_stops_it() {
    let home = ClusterFolder::new();
    let processes: Vec<_> =
        (0..4).map(|_| tokio::spawn(home.psql(&format!("{IDENTITY}, pg_sleep(0.2)")).output())).collect();
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let options = home.options();
            tokio::spawn(async {
                let cluster = Cluster::join(options).await.unwrap();
                let identity = answer(&cluster, IDENTITY).await;
                cluster.leave().await.unwrap();
                identity
            })
        })
        .collect();
    let mut identities = Vec::new();
    for process in processes {
        let output = process.await.unwrap().unwrap();
        assert!(output.status.success(), "{output:?}");
        let line = String::from_utf8(output.stdout).unwrap();
        identities.push(line.trim().trim_end_matches('|').to_owned());
    }
    for task in tasks {
        identities.push(task.await.unwrap());
    }
    identities.dedup();
    assert_eq!(identities.len(), 1, "{identities:?}");
    home.assert_stopped();
}

#[tokio::test]
async fn the_server_runs_until_the_last_user_leaves() {
    let home = ClusterFolder::new();
    let one = home.join().await.unwrap();
    let two = home.join().await.unwrap();
    let server = home.server();
    one.leave().await.unwrap();
    assert_eq!(home.server(), server);
    answer(&two, "SELECT 'still there'").await;
    drop(two);
    home.assert_stopped();
    // The port is remembered.
    let port = home.join().await.unwrap().tcp().port;
    assert_eq!(home.join().await.unwrap().tcp().port, port);
    home.assert_stopped();
}

/// The server is stopped when the last role ends. That is no failure, and nobody is told of one.
#[tokio::test]
async fn a_role_that_stops_its_server_complains_of_nothing() {
    let home = ClusterFolder::new();
    let bind = format!("127.0.0.1:{}", common::free_port());
    let up = refarch()
        .env("REFARCH_RUNTIME_DIR", &home.dir)
        .args(["up", "--until-synced", "--products", "5", "--workers", "1", "--bind", &bind])
        .output()
        .await
        .unwrap();
    let log = String::from_utf8_lossy(&up.stderr);
    assert!(up.status.success(), "{log}");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    home.assert_stopped();
}

#[tokio::test]
async fn a_cancelled_start_leaves_no_server() {
    let home = ClusterFolder::new();
    drop(tokio::time::timeout(Duration::from_millis(200), home.join()).await);
    eventually("the abandoned join to end", SOON, async || {
        home.dir.join("postgres/users.lock").exists() && home.server().is_none() && {
            let lock = fs::File::open(home.dir.join("postgres/transition.lock")).unwrap();
            lock.try_lock().is_ok()
        }
    })
    .await;
    home.join().await.unwrap().leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn a_server_left_by_killed_users_is_stopped_by_the_next_user() {
    let home = ClusterFolder::new();
    let mut user = home.psql("SELECT pg_sleep(60)").spawn().unwrap();
    eventually("the server to start", SOON, async || home.server().is_some()).await;
    // Joining waits until the server has started.
    home.join().await.unwrap().leave().await.unwrap();
    assert!(home.server().is_some());
    user.kill().await.unwrap();
    assert!(home.server().is_some());
    home.join().await.unwrap().leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn ctrl_c_in_the_terminal_does_not_stop_the_server() {
    let home = ClusterFolder::new();
    let mut starter = home.psql("SELECT pg_sleep(60)");
    let starter = starter.process_group(0).spawn().unwrap();
    let group = Pid::from_raw(-i32::try_from(starter.id().unwrap()).unwrap());
    eventually("the server to start", SOON, async || home.server().is_some()).await;
    let cluster = home.join().await.unwrap();
    eventually("the query to run", SOON, async || {
        answer(&cluster, "SELECT count(*)::text FROM pg_stat_activity WHERE query LIKE '%sleep(60)'").await
            == "1"
    })
    .await;
    kill(group, Signal::SIGINT).unwrap();
    let output = starter.wait_with_output().await.unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("canceling statement"), "{output:?}");
    assert_eq!(output.status.code(), Some(1));
    answer(&cluster, "SELECT 'still there'").await;
    cluster.leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn a_killed_server_recovers_every_committed_row() {
    let home = ClusterFolder::new();
    let cluster = home.join().await.unwrap();
    let client = connect(cluster.url().expose()).await;
    client.batch_execute("CREATE TABLE kept AS SELECT 'kept'::text AS what").await.unwrap();
    kill(home.server().unwrap(), Signal::SIGKILL).unwrap();
    let again = home.join().await.unwrap();
    assert_eq!(answer(&again, "SELECT what FROM kept").await, "kept");
    // The address of the first user still works.
    assert_eq!(answer(&cluster, "SELECT what FROM kept").await, "kept");
    again.leave().await.unwrap();
    assert!(home.server().is_some());
    cluster.leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn a_pid_file_that_names_another_process_is_treated_as_stale() {
    let home = ClusterFolder::new();
    home.join().await.unwrap().leave().await.unwrap();
    // PostgreSQL refuses to start only if the recorded process id belongs to a process of its own user.
    let data = fs::metadata(home.files().join("data")).unwrap();
    let mut other = std::process::Command::new("sleep");
    if Uid::effective().is_root() {
        other.uid(data.uid()).gid(data.gid());
    }
    let mut other = other.arg("60").spawn().unwrap();
    let text =
        format!("{}\n{}\n1\n5432\n/tmp\n127.0.0.1\n1 1\nready   \n", other.id(), home.files().display());
    fs::write(home.pid_file(), text).unwrap();
    let cluster = home.join().await.unwrap();
    assert_ne!(home.server().unwrap().as_raw(), i32::try_from(other.id()).unwrap());
    answer(&cluster, "SELECT 'up'").await;
    cluster.leave().await.unwrap();
    home.assert_stopped();
    assert!(other.try_wait().unwrap().is_none(), "the other process was not ours to end");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[tokio::test]
async fn a_port_that_another_process_took_is_replaced() {
    let home = ClusterFolder::new();
    let cluster = home.join().await.unwrap();
    let port = cluster.tcp().port;
    cluster.leave().await.unwrap();
    let _squatter = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let cluster = home.join().await.unwrap();
    assert_ne!(cluster.tcp().port, port);
    let tcp = cluster.tcp();
    let by_port = format!(
        "host={} port={} user={} password={} dbname={}",
        tcp.host,
        tcp.port,
        tcp.user,
        tcp.password.expose(),
        tcp.dbname
    );
    connect(&by_port).await.simple_query("SELECT 1").await.unwrap();
    cluster.leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn the_password_is_required_and_readable_by_its_owner_only() {
    let home = ClusterFolder::new();
    let cluster = home.join().await.unwrap();
    let guess = cluster.url().expose().replace(cluster.tcp().password.expose(), "guess");
    let error = tokio_postgres::connect(&guess, tokio_postgres::NoTls).await.err().unwrap();
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::INVALID_PASSWORD));
    assert!(!format!("{cluster:?}").contains(cluster.tcp().password.expose()));
    let mode = fs::metadata(home.files().join("password")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    cluster.leave().await.unwrap();
    home.assert_stopped();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_server_inherits_no_open_lock_file() {
    let home = ClusterFolder::new();
    let cluster = home.join().await.unwrap();
    let fds = fs::read_dir(format!("/proc/{}/fd", home.server().unwrap())).unwrap();
    let open: Vec<_> = fds.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect();
    assert!(open.iter().any(|path| path.ends_with("server.log")), "{open:?}");
    assert!(!open.iter().any(|path| path.extension().is_some_and(|e| e == "lock")), "{open:?}");
    cluster.leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn root_keeps_the_files_elsewhere_when_the_servers_user_cannot_reach_the_project() {
    // If the test does not run as root, the server runs as the same user and can read the project.
    if !is_root() {
        return;
    }
    let home = ClusterFolder::within("project", 0o700);
    let cluster = home.join().await.unwrap();
    assert!(home.files().starts_with("/var/lib/refarch"), "{:?}", home.files());
    answer(&cluster, "SELECT 'up'").await;
    cluster.leave().await.unwrap();
    home.assert_stopped();
    // The message appears only once.
    let output = home.psql("SELECT 'up'").output().await.unwrap();
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"up\n"[..], &b""[..]));
    home.assert_stopped();
    // Removing the files starts over.
    fs::remove_dir_all(home.files()).unwrap();
    home.join().await.unwrap().leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_gets_a_private_one_under_tmp() {
    let home = ClusterFolder::within(&"long/".repeat(30), 0o755);
    let cluster = home.join().await.unwrap();
    let config: tokio_postgres::Config = cluster.url().expose().parse().unwrap();
    let [tokio_postgres::config::Host::Unix(dir)] = config.get_hosts() else { panic!("no socket") };
    assert!(dir.starts_with("/tmp"), "{dir:?}");
    assert_eq!(fs::metadata(dir).unwrap().mode() & 0o777, 0o700);
    answer(&cluster, "SELECT 'up'").await;
    cluster.leave().await.unwrap();
    assert!(!dir.exists());
    home.assert_stopped();
}

#[tokio::test]
async fn folder_names_with_special_characters_work_or_are_refused() {
    let home = ClusterFolder::within("it's a, well, folder", 0o755);
    home.join().await.unwrap().leave().await.unwrap();
    home.assert_stopped();
    let home = ClusterFolder::within("a \"$HOME\" folder", 0o755);
    if Uid::effective().is_root() {
        home.join().await.unwrap().leave().await.unwrap();
        home.assert_stopped();
    } else {
        assert!(home.refusal().await.contains("move the folder"), "{}", home.refusal().await);
    }
}

#[tokio::test]
async fn missing_binaries_are_reported_with_the_remedy() {
    let home = ClusterFolder::new();
    fs::remove_file(home.dir.join("runtime")).unwrap();
    let refusal = home.refusal().await;
    assert!(refusal.contains("run refarch setup, or set DATABASE_URL"), "{refusal}");
    assert!(!home.dir.join("postgres").exists());
}

#[tokio::test]
async fn an_interrupted_initialisation_is_repeated() {
    let home = ClusterFolder::new();
    let half = home.dir.join("postgres/data.new.1");
    fs::create_dir_all(half.join("base")).unwrap();
    home.join().await.unwrap().leave().await.unwrap();
    assert!(!half.exists());
    home.assert_stopped();
}

#[tokio::test]
async fn data_of_another_version_is_refused_and_kept() {
    let home = ClusterFolder::new();
    home.join().await.unwrap().leave().await.unwrap();
    fs::write(home.files().join("data/PG_VERSION"), "17\n").unwrap();
    let refusal = home.refusal().await;
    assert!(refusal.contains("was made by PostgreSQL 17, and this is PostgreSQL 18"), "{refusal}");
    home.assert_stopped();
    assert!(home.files().join("data/base").is_dir());
}

#[tokio::test]
async fn a_failed_start_shows_the_servers_log() {
    let home = ClusterFolder::new();
    let extra = vec![("shared_buffers".to_owned(), "plenty".to_owned())];
    let options = ClusterOptions { extra, ..home.options() };
    let error = format!("{:#}", Cluster::join(options).await.unwrap_err());
    assert!(error.contains("invalid value for parameter \"shared_buffers\""), "{error}");
    home.join().await.unwrap().leave().await.unwrap();
    home.assert_stopped();
}

#[tokio::test]
async fn a_missing_password_file_is_named() {
    let home = ClusterFolder::new();
    home.join().await.unwrap().leave().await.unwrap();
    fs::remove_file(home.files().join("password")).unwrap();
    let refusal = home.refusal().await;
    assert!(refusal.contains("password"), "{refusal}");
    home.assert_stopped();
}

#[tokio::test]
async fn a_copied_project_gets_its_own_data() {
    // Data is kept outside of the project only if root runs refarch.
    if !is_root() {
        return;
    }
    let home = ClusterFolder::within("project", 0o700);
    home.join().await.unwrap().leave().await.unwrap();
    let copy = ClusterFolder::within("project", 0o700);
    fs::create_dir(copy.dir.join("postgres")).unwrap();
    let location = |home: &ClusterFolder| home.dir.join("postgres/location");
    fs::copy(location(&home), location(&copy)).unwrap();
    copy.join().await.unwrap().leave().await.unwrap();
    assert_ne!(home.files(), copy.files());
    // A project that moved keeps its data.
    let moved = ClusterFolder::within("project", 0o700);
    let before = copy.files();
    fs::rename(copy.dir.join("postgres"), moved.dir.join("postgres")).unwrap();
    moved.join().await.unwrap().leave().await.unwrap();
    assert_eq!(moved.files(), before);
    assert!(Path::new(&before).join("data").is_dir());
}

/// A folder that only root may change, and its original contents.
struct RootOnlyFolder {
    dir: TempDir,
}

impl RootOnlyFolder {
    const TEXT: &str = "root's own\n";

    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(dir.path().join("file"), Self::TEXT).unwrap();
        fs::set_permissions(dir.path().join("file"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        fs::write(dir.path().join("folder/postmaster.pid"), Self::TEXT).unwrap();
        fs::write(dir.path().join("folder/PG_VERSION"), "18\n").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn assert_untouched(&self, after: &str) {
        for name in ["file", "folder/postmaster.pid"] {
            let text = fs::read_to_string(self.path(name));
            assert_eq!(text.ok().as_deref(), Some(Self::TEXT), "{after}: {name} was written to");
        }
        for (name, mode) in [("file", 0o640), ("folder", 0o755), ("", 0o700)] {
            let meta = fs::metadata(self.path(name)).unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o777), (0, mode), "{after}: {name:?} was given away");
        }
        let names = |dir: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.dir.path()), ["file", "folder"], "{after}");
        assert_eq!(names(&self.path("folder")), ["PG_VERSION", "postmaster.pid"], "{after}");
    }
}

/// Tries to join, and leaves. Both success and failure are allowed.
async fn try_join(home: &ClusterFolder) -> String {
    match home.join().await {
        Ok(cluster) => cluster.leave().await.map_or_else(|error| format!("{error:#}"), |()| "joined".into()),
        Err(error) => format!("{error:#}"),
    }
}

fn is_root() -> bool {
    let root = Uid::effective().is_root();
    if !root {
        cannot_run("only root hands its server to another user");
    }
    root
}

#[tokio::test]
async fn root_follows_no_link_that_the_servers_user_created() {
    if !is_root() {
        return;
    }
    let vault = RootOnlyFolder::new();
    for mode in [0o755, 0o700] {
        let home = ClusterFolder::within("project", mode);
        home.join().await.unwrap().leave().await.unwrap();
        let files = home.files();
        let user = fs::metadata(files.join("data")).unwrap();
        let (uid, gid) = (Some(user.uid()), Some(user.gid()));
        // The log is so long that each start moves it aside.
        let long_log = || {
            let log = files.join("server.log");
            let _ = fs::remove_file(&log);
            fs::File::create(&log).unwrap().set_len(17 << 20).unwrap();
            std::os::unix::fs::chown(&log, uid, gid).unwrap();
        };
        let names = [
            "password",
            "port",
            "socket",
            "origin",
            "location",
            "server.log",
            "server.log.1",
            "transition.lock",
            "users.lock",
            "data/postgresql.conf",
            "data/postmaster.pid",
            "data/PG_VERSION",
            "data",
        ];
        for name in names {
            let targets = match (mode, name) {
                // The other files are tested in the other mode: their place makes no difference.
                (0o700, "origin" | "location" | "password" | "server.log.1") => &["file"][..],
                (0o700, _) => &[],
                (_, "server.log" | "server.log.1") => &["file", "new", "folder", "hard link"],
                (_, "port" | "socket" | "data/postgresql.conf") => &["file", "hard link"],
                (_, "data") => &["folder"],
                _ => &["file", "new"],
            };
            for generation in targets.iter().copied() {
                let path = files.join(name);
                let saved = path.with_extension("saved");
                let existed = fs::rename(&path, &saved).is_ok();
                if name == "server.log.1" {
                    long_log();
                }
                if generation == "hard link" {
                    // Many systems forbid hard links to files of other users. A link from earlier may exist.
                    if fs::hard_link(vault.path("file"), &path).is_err() {
                        cannot_run("no hard link can be made here");
                        let _ = fs::rename(&saved, &path);
                        continue;
                    }
                } else {
                    std::os::unix::fs::symlink(vault.path(generation), &path).unwrap();
                    std::os::unix::fs::lchown(&path, uid, gid).unwrap();
                }
                let outcome = try_join(&home).await;
                let what = format!("{name} led to the {generation}, and the outcome was {outcome:?}");
                assert!(!outcome.contains("root's own"), "{what}");
                if fs::symlink_metadata(&path).is_ok_and(|meta| !meta.is_dir()) {
                    fs::remove_file(&path).unwrap();
                }
                if path.is_dir() && existed {
                    fs::remove_dir_all(&path).unwrap();
                }
                if existed {
                    fs::rename(&saved, &path).unwrap();
                }
                vault.assert_untouched(&what);
            }
        }
        assert_eq!(try_join(&home).await, "joined");
        home.assert_stopped();
    }
}

#[tokio::test]
async fn root_ignores_a_location_it_did_not_write_and_keeps_the_owner_of_other_folders() {
    if !is_root() {
        return;
    }
    let vault = RootOnlyFolder::new();
    let home = ClusterFolder::new();
    home.join().await.unwrap().leave().await.unwrap();
    let data = fs::metadata(home.files().join("data")).unwrap();
    let location = home.dir.join("postgres/location");
    fs::write(&location, vault.path("folder").to_str().unwrap()).unwrap();
    std::os::unix::fs::chown(&location, Some(data.uid()), Some(data.gid())).unwrap();
    let outcome = try_join(&home).await;
    vault.assert_untouched(&outcome);
    fs::remove_file(&location).unwrap();
    assert_eq!(try_join(&home).await, "joined");
    home.assert_stopped();
    // The cluster's folder is a link to another folder.
    let linked = ClusterFolder::new();
    fs::create_dir_all(&linked.dir).unwrap();
    std::os::unix::fs::symlink(vault.path("folder"), linked.dir.join("postgres")).unwrap();
    fs::set_permissions(vault.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let refusal = linked.refusal().await;
    fs::set_permissions(vault.dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    for lock in ["transition.lock", "users.lock"] {
        let _ = fs::remove_file(vault.path("folder").join(lock));
    }
    vault.assert_untouched(&refusal);
    assert!(refusal.contains("PG_VERSION") || refusal.contains("postmaster.pid"), "{refusal}");
}
