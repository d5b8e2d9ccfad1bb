-- The schema of refarch: see src/pipeline for what the tables promise.

-- A table that is kept in step.
CREATE TABLE refarch.source (
    name             text PRIMARY KEY,
    relation         regclass NOT NULL,
    id_column        text NOT NULL,
    text_columns     text[] NOT NULL,
    metadata_columns text[] NOT NULL,
    armed_at         timestamptz NOT NULL DEFAULT now()
);

-- A source and an index that it feeds. One is active; the salt (model and text template) decides
-- whether a stored vector can stand for a row's text.
CREATE TABLE refarch.target (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source     text NOT NULL REFERENCES refarch.source ON DELETE CASCADE,
    kind       text NOT NULL,
    name       text NOT NULL,
    namespace  text NOT NULL DEFAULT '',
    model      text NOT NULL,
    dimensions integer NOT NULL,
    salt       text NOT NULL,
    state      text NOT NULL DEFAULT 'active' CHECK (state IN ('building', 'active', 'retired')),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX target_active ON refarch.target (source) WHERE state = 'active';

-- Committed changes that have not reached the queue: up to 500 ids of one statement a row.
-- op: u upsert, d delete, t the table was truncated (no ids; expanded from the ledger).
CREATE TABLE refarch.outbox (
    seq           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source        text NOT NULL,
    op            "char" NOT NULL CHECK (op IN ('u', 'd', 't')),
    ids           text[] NOT NULL,
    xid           xid8 NOT NULL DEFAULT pg_current_xact_id(),
    changed_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    claimed_until timestamptz
) WITH (
    -- Rows live for milliseconds: clean up by number, not by share, and without pausing.
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);
-- Live changes are claimed transaction by transaction, so that a large one can be stepped over.
CREATE INDEX outbox_by_transaction ON refarch.outbox (source, xid, seq);
CREATE INDEX outbox_large ON refarch.outbox (source, seq) WHERE cardinality(ids) > 100;

-- What each index is known to hold. open = 0 and not dirty: the index equals the hashes.
CREATE TABLE refarch.ledger (
    target        integer NOT NULL REFERENCES refarch.target ON DELETE CASCADE,
    id            text NOT NULL,
    open          integer NOT NULL DEFAULT 0 CHECK (open >= 0),
    epoch         bigint NOT NULL DEFAULT 0,
    dirty         boolean NOT NULL DEFAULT true,
    content_hash  bytea,
    metadata_hash bytea,
    deleted       boolean NOT NULL DEFAULT false,
    version       bigint NOT NULL DEFAULT 0,
    synced_at     timestamptz,
    tries         integer NOT NULL DEFAULT 0,
    PRIMARY KEY (target, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- Writes under way to an index that cannot fence: one row a batch.
CREATE TABLE refarch.attempt (
    attempt_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    target       integer NOT NULL REFERENCES refarch.target ON DELETE CASCADE,
    worker_id    text NOT NULL,
    ids          text[] NOT NULL,
    epochs       bigint[] NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT now(),
    abandoned_at timestamptz
);

-- Who works, and how much.
CREATE TABLE refarch.worker (
    worker_id    text PRIMARY KEY,
    role         text NOT NULL,
    host         text NOT NULL,
    pid          integer NOT NULL,
    threads      integer NOT NULL DEFAULT 0,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    applied      bigint NOT NULL DEFAULT 0,
    embedded     bigint NOT NULL DEFAULT 0
);

-- What happened: joined, left, scaled, reconnected, dead letter.
CREATE TABLE refarch.event (
    event_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT now(),
    worker_id text,
    kind      text NOT NULL,
    detail    jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX event_at ON refarch.event (at);

-- Gauges by the second, kept an hour. freshness: a sparse histogram, bucket numbers and counts.
CREATE TABLE refarch.sample (
    worker_id text NOT NULL,
    at        timestamptz NOT NULL,
    applied   bigint NOT NULL,
    embedded  bigint NOT NULL,
    freshness_buckets smallint[] NOT NULL DEFAULT '{}',
    freshness_counts  bigint[] NOT NULL DEFAULT '{}',
    PRIMARY KEY (worker_id, at)
);
CREATE INDEX sample_at ON refarch.sample (at);

-- Whether the relay sleeps, so that a committing writer must ring. NOTIFY serialises commits, so it
-- is sent only then. Unlogged: after a crash the row is missing, which reads as asleep.
CREATE UNLOGGED TABLE refarch.doorbell (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    asleep boolean NOT NULL
) WITH (fillfactor = 10);

-- Called by the capture triggers only. Not STRICT, not STABLE: each call must see the newest flag.
CREATE FUNCTION refarch.ring() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
    IF coalesce((SELECT asleep FROM refarch.doorbell), true) THEN
        PERFORM pg_catalog.pg_notify('refarch_outbox', '');
    END IF;
END $$;

-- Arms capture on a table and on every table below it (partitions, inheritance children), and
-- returns the names of those on which a trigger was made. Statement level with transition tables:
-- one outbox row for up to 500 ids of a statement. SECURITY DEFINER: the application's role needs
-- no right on this schema. Triggers that stand already are left alone, so that arming again takes
-- no lock on the table.
CREATE FUNCTION refarch.arm(source text, relation regclass, id_column text, watched text[])
RETURNS SETOF regclass
LANGUAGE plpgsql SET search_path = '' AS $arm$
DECLARE
    head constant text := 'CREATE OR REPLACE FUNCTION refarch.%1$I() RETURNS trigger LANGUAGE plpgsql '
        'SECURITY DEFINER SET search_path = '''' AS $t$ BEGIN ';
    tail constant text := ' IF FOUND THEN PERFORM refarch.ring(); END IF; RETURN NULL; END $t$';
    -- Chunks of 500 in the order of the transition table.
    pack constant text := 'INSERT INTO refarch.outbox (source, op, ids) '
        'SELECT %2$L, k.op, pg_catalog.array_agg(k.id) FROM ('
        'SELECT c.op, c.id, (pg_catalog.row_number() OVER (PARTITION BY c.op) - 1) / 500 AS chunk FROM (%3$s) c'
        ') k GROUP BY k.op, k.chunk;';
    old_watched text;
    new_watched text;
    leaf regclass;
    kind text;
    fn text;
    made boolean;
BEGIN
    SELECT pg_catalog.string_agg(pg_catalog.format('o.%I', w), ', '),
           pg_catalog.string_agg(pg_catalog.format('n.%I', w), ', ')
      INTO old_watched, new_watched FROM pg_catalog.unnest(watched) w;

    EXECUTE pg_catalog.format(head || pack || tail, 'capture_' || source || '_insert', source,
        pg_catalog.format('SELECT ''u''::"char" AS op, n.%I::text AS id FROM new_rows n', id_column));
    EXECUTE pg_catalog.format(head || pack || tail, 'capture_' || source || '_delete', source,
        pg_catalog.format('SELECT ''d''::"char" AS op, o.%I::text AS id FROM old_rows o', id_column));
    -- An id that went is a delete, one that came an upsert. *<> compares images: it tells every
    -- difference apart, of every type, and nulls from values.
    EXECUTE pg_catalog.format(head || pack || tail, 'capture_' || source || '_update', source,
        pg_catalog.format(
            'SELECT CASE WHEN n.%1$I IS NULL THEN ''d''::"char" ELSE ''u''::"char" END AS op, '
            'coalesce(n.%1$I, o.%1$I)::text AS id FROM old_rows o FULL JOIN new_rows n ON o.%1$I = n.%1$I '
            'WHERE o.%1$I IS NULL OR n.%1$I IS NULL OR ROW(%2$s)::record OPERATOR(pg_catalog.*<>) ROW(%3$s)::record',
            id_column, old_watched, new_watched));
    EXECUTE pg_catalog.format(head ||
        'INSERT INTO refarch.outbox (source, op, ids) VALUES (%2$L, ''t'', ''{}'');' || tail,
        'capture_' || source || '_truncate', source);

    FOR leaf IN
        WITH RECURSIVE tree(oid) AS (
            SELECT relation::oid
            UNION
            SELECT i.inhrelid FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid
        )
        SELECT c.oid::regclass FROM tree JOIN pg_catalog.pg_class c USING (oid) WHERE c.relkind IN ('r', 'p')
    LOOP
        made := false;
        FOREACH kind IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
            fn := 'capture_' || source || '_' || kind;
            IF EXISTS (
                SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
                WHERE t.tgrelid = leaf AND t.tgname = 'refarch_' || source || '_' || kind
                  AND p.proname = fn AND p.pronamespace = 'refarch'::regnamespace AND t.tgenabled IN ('O', 'A')
            ) THEN
                CONTINUE;
            END IF;
            EXECUTE pg_catalog.format(
                'CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH STATEMENT EXECUTE FUNCTION refarch.%I()',
                'refarch_' || source || '_' || kind, kind, leaf,
                CASE kind
                    WHEN 'insert' THEN 'REFERENCING NEW TABLE AS new_rows'
                    WHEN 'delete' THEN 'REFERENCING OLD TABLE AS old_rows'
                    WHEN 'update' THEN 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'
                    ELSE ''
                END, fn);
            made := true;
        END LOOP;
        IF made THEN
            RETURN NEXT leaf;
        END IF;
    END LOOP;
END $arm$;

-- Puts every row of the table into the outbox, as if each had just been written.
CREATE FUNCTION refarch.backfill(source text, relation regclass, id_column text) RETURNS bigint
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
    queued bigint;
BEGIN
    EXECUTE pg_catalog.format(
        'WITH packed AS (INSERT INTO refarch.outbox (source, op, ids) '
        'SELECT %1$L, ''u'', pg_catalog.array_agg(k.id) FROM ('
        'SELECT %2$I::text AS id, (pg_catalog.row_number() OVER () - 1) / 500 AS chunk FROM %3$s) k '
        'GROUP BY k.chunk RETURNING pg_catalog.cardinality(ids) AS n) '
        'SELECT coalesce(sum(n), 0) FROM packed', source, id_column, relation) INTO queued;
    IF queued > 0 THEN
        PERFORM refarch.ring();
    END IF;
    RETURN queued;
END $$;
