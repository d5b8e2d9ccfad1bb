-- What concerns all changes and holds the work, as each worker meets it: one row a worker and kind, for as
-- long as it lasts. Of no meaning once the worker has no heartbeat.
CREATE TABLE refarch.fault (
    worker_id text NOT NULL,
    kind      text NOT NULL,
    message   text NOT NULL,
    since     timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (worker_id, kind)
);
