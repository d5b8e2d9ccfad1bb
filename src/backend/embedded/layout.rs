//! The folders of a cluster, and the user that its server runs as.
//!
//! PostgreSQL refuses to run as root, so root runs the server as an unprivileged user. That user may have no
//! access to the project's folder, for example under `/root`. Then the data, or a copy of the binaries, or
//! both are kept under [`SHARED`].

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::unistd::Uid;

use super::digest::short_hash;
use super::options::ClusterOptions;
use super::server_user::{ServerUser, service_user, sudo_user};
use super::shared_folder::{SHARED, copied_install, make_public_dir};
use super::{log, no_follow};
use crate::secret::Secret;

/// File in the cluster's folder. It holds the path of the home, if the home is elsewhere.
const LOCATION: &str = "location";

/// File in a home elsewhere. It holds the path of the cluster's folder.
const ORIGIN: &str = "origin";

/// The data for starting and stopping a server. Paths are absolute.
#[derive(Clone, Debug)]
pub struct ClusterLayout {
    /// Folder of the data directory, the password, the log and the files that keep values between starts.
    pub home: PathBuf,
    /// The PostgreSQL installation.
    pub install: PathBuf,
    /// The user that the server runs as, if not the user of this process.
    pub user: Option<ServerUser>,
    /// Further server settings.
    pub extra: Vec<(String, String)>,
}

impl ClusterLayout {
    /// Chooses the folders and the user. Creates the home, and a copy of the binaries if necessary. Call this
    /// only within a transition.
    pub fn find(options: &ClusterOptions) -> anyhow::Result<Self> {
        let dir = options.dir.canonicalize()?;
        let install = options.install.canonicalize()?;
        let elsewhere = recorded_home(&dir)?;
        let home = elsewhere.clone().unwrap_or_else(|| dir.clone());
        let mut layout = Self { home, install, user: None, extra: options.extra.clone() };
        let owner_of = |path: &Path| {
            let folder = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_dir)?;
            Some(ServerUser { uid: folder.uid(), gid: folder.gid() })
        };
        let owner = owner_of(&layout.data());
        let me = Uid::effective();
        if !me.is_root() {
            if let Some(owner) = owner.filter(|owner| owner.uid != me.as_raw()) {
                bail!(
                    "{} belongs to another user (uid {}): run refarch as that user or as root, or set DATABASE_URL",
                    layout.data().display(),
                    owner.uid
                );
            }
            for path in [&layout.home, &layout.install] {
                if !fits_shell(path) {
                    bail!(
                        "the path {} contains a quote, dollar, backslash or line break, which PostgreSQL's tools cannot handle: move the folder, or set REFARCH_RUNTIME_DIR",
                        path.display()
                    );
                }
            }
            return Ok(layout);
        }
        let user = [owner, owner_of(&layout.home)]
            .into_iter()
            .flatten()
            .find(|owner| owner.uid != 0)
            .or_else(sudo_user)
            .unwrap_or_else(service_user);
        layout.user = Some(user);
        if elsewhere.is_none() && !(fits_shell(&dir) && layout.succeeds_as_server("cd \"$0\"", &dir)?) {
            layout.home = Path::new(SHARED).join(short_hash(dir.as_os_str().as_bytes()));
            make_public_dir(&layout.home)?;
            no_follow::replace(&layout.home.join(ORIGIN), dir.as_os_str().as_bytes())?;
            no_follow::replace(&dir.join(LOCATION), layout.home.as_os_str().as_bytes())?;
            tracing::warn!(
                "uid {} has no access to {}: the files of the private PostgreSQL are in {}",
                user.uid,
                dir.display(),
                layout.home.display()
            );
        }
        let reach = "\"$0/bin/postgres\" --version && cd \"$0/share\"";
        if !(fits_shell(&layout.install) && layout.succeeds_as_server(reach, &layout.install)?) {
            layout.install = copied_install(&layout.install).with_context(|| {
                format!("cannot copy {} to {SHARED} for uid {}", layout.install.display(), user.uid)
            })?;
        }
        layout.chown_home()?;
        Ok(layout)
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    /// The server's log.
    pub fn log(&self) -> PathBuf {
        self.home.join("server.log")
    }

    /// Path of the file with the superuser's password.
    pub fn password_file(&self) -> PathBuf {
        self.home.join("password")
    }

    /// The superuser's password.
    pub fn password(&self) -> anyhow::Result<Secret> {
        let path = self.password_file();
        let text = self.read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Secret::new(text.trim()))
    }

    /// Opens a file in the server's folders for reading.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        no_follow::open(path, self.user.map(|user| user.uid))
    }

    /// Reads a file in the server's folders.
    pub fn read(&self, path: &Path) -> io::Result<String> {
        no_follow::read(path, self.user.map(|user| user.uid))
    }

    /// Writes a file that only the server's user can read. Replaces a file with the same name.
    pub fn write(&self, path: &Path, text: &str) -> anyhow::Result<()> {
        self.as_server(
            "umask 077 && rm -f -- \"$0.new\" && cat >\"$0.new\" && mv -f -- \"$0.new\" \"$0\"",
            path,
            text,
        )
        .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Runs a shell line as the server's user, with the path as `$0`. So the server's user cannot make root
    /// do anything that this user is not allowed to do.
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
            // If the shell ended early, its standard error has the reason.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = shell.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Moves a log that is too long to `server.log.1`.
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

    /// A command for one of PostgreSQL's programs. It runs as the server's user, receives no signals from our
    /// terminal, and does not inherit our environment.
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

    /// Gives the home to the server's user. Uses the folder's handle, because another process may put another
    /// folder under the same name. Refuses a folder with other files than a cluster's, because this may have
    /// happened already.
    fn chown_home(&self) -> anyhow::Result<()> {
        let (Some(user), home) = (self.user, self.home.display()) else { return Ok(()) };
        let folder = no_follow::open_folder(&self.home).with_context(|| format!("cannot open {home}"))?;
        let owner = folder.metadata()?.uid();
        if owner == user.uid {
            return Ok(());
        }
        if owner != 0 {
            bail!(
                "{home} belongs to uid {owner}, but its server runs as uid {}: give the folder and its data to one user, or remove one of them",
                user.uid
            );
        }
        for entry in fs::read_dir(&self.home)? {
            let name = entry?.file_name();
            if !is_ours(name.as_bytes()) {
                bail!(
                    "{home} contains {}, which is not a file of a private PostgreSQL, so the folder is not given to uid {}: \
                     move that file away, or set REFARCH_RUNTIME_DIR to another folder",
                    name.display(),
                    user.uid
                );
            }
        }
        fchown(&folder, Some(user.uid), Some(user.gid))
            .with_context(|| format!("cannot give {home} to uid {}", user.uid))
    }

    /// Whether a shell line, with the path as `$0`, succeeds as the server's user.
    fn succeeds_as_server(&self, line: &str, path: &Path) -> anyhow::Result<bool> {
        let output = self
            .command("/bin/sh")
            .args(["-c", line])
            .arg(path)
            .output()
            .context("cannot run a command as the server's unprivileged user")?;
        Ok(output.status.success())
    }
}

/// Whether a path is safe for `pg_ctl` and initdb, which put paths between double quotes into shell lines.
fn fits_shell(path: &Path) -> bool {
    !path.as_os_str().as_bytes().iter().any(|byte| b"\"$`\\\n".contains(byte))
}

/// The home elsewhere that the cluster's folder names, if any. The folder may belong to the server's user. So
/// root accepts only a file that root wrote, and only a home directly under [`SHARED`].
fn recorded_home(dir: &Path) -> anyhow::Result<Option<PathBuf>> {
    let is_root = Uid::effective().is_root();
    let location = dir.join(LOCATION);
    let home = match no_follow::read(&location, is_root.then_some(0)) {
        Ok(text) => PathBuf::from(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", location.display())),
    };
    if is_root && home.parent() != Some(Path::new(SHARED)) {
        bail!("{} names {}, which is not in {SHARED}: remove it", location.display(), home.display());
    }
    if !fs::symlink_metadata(&home).is_ok_and(|home| home.is_dir()) {
        // The home was removed, so start with a new one.
        return Ok(None);
    }
    let origin = PathBuf::from(no_follow::read(&home.join(ORIGIN), None).unwrap_or_default());
    if origin != dir && recorded_home_is(&origin, &home) {
        // This folder is a copy, and the original still exists. The two must not share one home.
        fs::remove_file(location)?;
        return Ok(None);
    }
    if origin != dir {
        // The cluster's folder was moved.
        no_follow::replace(&home.join(ORIGIN), dir.as_os_str().as_bytes())?;
    }
    Ok(Some(home))
}

fn recorded_home_is(dir: &Path, home: &Path) -> bool {
    no_follow::read(&dir.join(LOCATION), None).is_ok_and(|text| Path::new(&text) == home)
}

/// Whether a cluster's folder may contain a file with this name.
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
