//! The unprivileged user that the server runs as, if this process is root.

use nix::unistd::User;

/// The server's user if no other one is found: the id of `nobody` on Linux.
const NOBODY: u32 = 65534;

/// An unprivileged user.
#[derive(Clone, Copy, Debug)]
pub struct ServerUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// The user that called sudo, who most likely owns the project's folder.
pub fn sudo_user() -> Option<ServerUser> {
    let id = |name| std::env::var(name).ok()?.parse().ok().filter(|id: &u32| *id != 0);
    Some(ServerUser { uid: id("SUDO_UID")?, gid: id("SUDO_GID")? })
}

/// The user of a package, or `nobody`.
pub fn service_user() -> ServerUser {
    ["postgres", "nobody"]
        .iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .filter(|user| !user.uid.is_root())
        .map_or(ServerUser { uid: NOBODY, gid: NOBODY }, |user| ServerUser {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })
}
