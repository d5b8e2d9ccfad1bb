-- Attempts have names that their workers choose before they open them, so that a worker that is told
-- "failed" of an opening that was committed can disown it.
DROP TABLE refarch.attempt;
CREATE TABLE refarch.attempt (
    attempt_id   text PRIMARY KEY,
    target       integer NOT NULL REFERENCES refarch.target ON DELETE CASCADE,
    worker_id    text NOT NULL,
    ids          text[] NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    abandoned_at timestamptz
);
CREATE INDEX attempt_of_worker ON refarch.attempt (target, worker_id);

-- Which state of which database an index outside of it belongs to. The mark grows; an index that has
-- seen a higher one than the database has was written to by a later state of it.
CREATE TABLE refarch.lineage (
    target integer PRIMARY KEY REFERENCES refarch.target ON DELETE CASCADE,
    name   text NOT NULL DEFAULT gen_random_uuid()::text,
    mark   bigint NOT NULL DEFAULT 0
);

-- Puts every row of the table and every entry of the ledger into the outbox as not to be trusted.
CREATE FUNCTION refarch.distrust(wanted integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    src refarch.source;
    queued bigint;
BEGIN
    SELECT s.* INTO src FROM refarch.source s JOIN refarch.target t ON t.source = s.name WHERE t.id = wanted;
    -- In id order, as every other writer of the ledger locks it.
    PERFORM 1 FROM refarch.ledger l WHERE l.target = wanted ORDER BY l.id COLLATE "C" FOR UPDATE;
    UPDATE refarch.ledger l SET epoch = l.epoch + 1, dirty = true, content_hash = NULL, metadata_hash = NULL,
           deleted = false, parked = false WHERE l.target = wanted;
    INSERT INTO refarch.outbox (source, op, ids) VALUES (src.name, 't', '{}');
    queued := refarch.backfill(src.name, src.relation, src.id_column);
    RETURN queued;
END $$;

-- Whether the id's change stands in the dead letters, so that sweeping its attempts need not queue it.
ALTER TABLE refarch.ledger ADD COLUMN parked boolean NOT NULL DEFAULT false;
