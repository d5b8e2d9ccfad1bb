-- The continuous proof of a target: who may work on it, and how far its round is.
CREATE TABLE refarch.proof (
    target     integer PRIMARY KEY REFERENCES refarch.target ON DELETE CASCADE,
    worker_id  text,
    held_until timestamptz,
    round      jsonb
) WITH (fillfactor = 50);

-- Rounds that ended.
CREATE TABLE refarch.proof_round (
    round_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    target      integer NOT NULL REFERENCES refarch.target ON DELETE CASCADE,
    -- full: every record was compared; sample: ids, and some records.
    index_check text NOT NULL,
    began_at    timestamptz NOT NULL,
    ended_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows        bigint NOT NULL,
    records     bigint NOT NULL,
    entries     bigint NOT NULL,
    differences bigint NOT NULL,
    mended      bigint NOT NULL,
    unreadable  bigint NOT NULL
);
CREATE INDEX proof_round_of_target ON refarch.proof_round (target, round_id);

-- Hashes of the ids that an index outside of the database listed in this round. Unlogged: what a crash
-- takes away is listed again.
CREATE UNLOGGED TABLE refarch.listed (
    target  integer NOT NULL,
    id_hash bigint NOT NULL,
    PRIMARY KEY (target, id_hash)
);

-- Freshness by lane: the columns that were there are those of live changes.
ALTER TABLE refarch.sample ADD COLUMN bulk_buckets smallint[] NOT NULL DEFAULT '{}',
                           ADD COLUMN bulk_counts bigint[] NOT NULL DEFAULT '{}';
