-- The lists (IVFFlat) over a target's vectors: how they were built, and how much searches through them find. Workers
-- write it, searches read the probes. A target without lists has no row.
CREATE TABLE refarch.search_index (
    target          integer PRIMARY KEY REFERENCES refarch.target ON DELETE CASCADE,
    lists           integer NOT NULL,
    -- Lists that a search reads.
    probes          integer NOT NULL,
    probes_at_build integer NOT NULL,
    -- Vectors at the build.
    rows            bigint NOT NULL,
    built_at        timestamptz NOT NULL DEFAULT now(),
    build_ms        bigint NOT NULL,
    -- Rows written to the table of vectors by the statistics, at the build and at the last check.
    built_writes    bigint NOT NULL,
    checked_writes  bigint NOT NULL DEFAULT 0,
    checked_at      timestamptz,
    -- The part of the true ten nearest that sampled searches found, from 0 to 1.
    recall          real,
    -- Size of the list that a search meets first, over the average size.
    skew            real,
    skew_at_build   real,
    degraded        boolean NOT NULL DEFAULT false
);

-- The same as refarch.build_graph(integer, integer, integer), for lists. It has that name, since the rights are given by
-- name. A role that does not own the table of vectors calls it; the owner builds CONCURRENTLY, without it.
CREATE FUNCTION refarch.build_graph(wanted integer, lists integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    extension_schema text;
BEGIN
    SELECT n.nspname INTO extension_schema FROM refarch.target t, pg_catalog.pg_extension e
    JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE t.id = wanted AND e.extname = 'vector';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no target % with vectors', wanted;
    END IF;
    EXECUTE pg_catalog.format('DROP INDEX IF EXISTS refarch.vector_%s_lists_new', wanted);
    EXECUTE pg_catalog.format(
        'CREATE INDEX vector_%1$s_lists_new ON refarch.vector_%1$s USING ivfflat (embedding %2$I.halfvec_cosine_ops) '
        'WITH (lists = %3$s)', wanted, extension_schema, lists);
    EXECUTE pg_catalog.format('DROP INDEX IF EXISTS refarch.vector_%s_lists', wanted);
    EXECUTE pg_catalog.format('ALTER INDEX refarch.vector_%1$s_lists_new RENAME TO vector_%1$s_lists', wanted);
END $$;

CREATE FUNCTION refarch.drop_graph(wanted integer, method text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
BEGIN
    IF method NOT IN ('lists', 'graph') THEN
        RAISE EXCEPTION 'there is no method %', method;
    END IF;
    EXECUTE pg_catalog.format('DROP INDEX IF EXISTS refarch.vector_%s_%s', wanted, method);
    IF method = 'lists' THEN
        EXECUTE pg_catalog.format('DROP INDEX IF EXISTS refarch.vector_%s_lists_new', wanted);
    END IF;
END $$;
