//! Options of a migration.

/// The parts that [`MigrateOptions::roles`] may name. `edit` is the right to change the table's rows, for a `serve`
/// that edits products.
pub const PARTS: [&str; 5] = ["listen", "embed", "serve", "verify", "edit"];

/// What a migration may do beyond an update of the database.
#[derive(Clone, Debug, Default)]
pub struct MigrateOptions {
    /// Delete an index whose content differs from the settings.
    pub rebuild: bool,
    /// Roles of the database that get the rights of a part: pairs of part, from [`PARTS`], and role.
    pub roles: Vec<(String, String)>,
}
