-- Changes that a worker holds: received, and not finished. Where none are held, a process can end at once.
ALTER TABLE refarch.worker ADD COLUMN held bigint NOT NULL DEFAULT 0;

-- For the last decisions about the number of workers.
CREATE INDEX event_kind ON refarch.event (kind, event_id);

-- Periodic work that one worker does for all, and when it was begun last.
CREATE TABLE refarch.chore (
    name     text PRIMARY KEY,
    begun_at timestamptz NOT NULL
);
