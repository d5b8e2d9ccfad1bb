-- Which part writes to which table: each that is named, and no other. Until now a part could write to every table that
-- was not named as another's, so the page's role could write to the books of the proof.

-- The tables (a pattern for the whole name), the parts, and their rights. A table that comes later is written by the owner
-- only, until a migration names it here.
CREATE FUNCTION refarch.writes(OUT tables text, OUT parts text[], OUT rights text) RETURNS SETOF record
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    VALUES
        -- Each process tells of itself.
        ('^(worker|fault)$', ARRAY['listen', 'embed', 'serve', 'verify'], 'INSERT, UPDATE, DELETE'),
        ('^(event|sample)$', ARRAY['listen', 'serve', 'verify'], 'INSERT'),
        -- One embed deletes what is old, and locks it first, which takes the right to update.
        ('^(event|sample)$', ARRAY['embed'], 'INSERT, UPDATE, DELETE'),
        ('^(doorbell|shipment|packing)$', ARRAY['listen'], 'INSERT, UPDATE, DELETE'),
        ('^outbox$', ARRAY['listen', 'embed', 'verify'], 'INSERT, UPDATE, DELETE'),
        ('^(ledger|lineage|count_delta)$', ARRAY['embed', 'verify'], 'INSERT, UPDATE, DELETE'),
        ('^(attempt|vector_[0-9]+)$', ARRAY['embed'], 'INSERT, UPDATE, DELETE'),
        ('^(proof|proof_round|listed|search_index|landmark|outlier|chore)$', ARRAY['embed'], 'INSERT, UPDATE, DELETE')
$$;

-- Gives the roles in refarch.granted what their parts need, and nobody else the right to call our functions. Run by
-- each migration, so that tables and functions that came later are told of, too. It takes away what an earlier version
-- gave and refarch.writes does not name.
CREATE OR REPLACE FUNCTION refarch.give_rights() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one record;
    allowed record;
    functions text;
    queues text;
    needed name;
BEGIN
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA refarch FROM PUBLIC;
    FOR one IN
        SELECT DISTINCT g.name FROM refarch.granted g JOIN pg_catalog.pg_roles r ON r.rolname = g.name
        -- An owner writes to its tables by its own right.
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class c
                          WHERE c.relnamespace = 'refarch'::regnamespace AND c.relowner = r.oid)
    LOOP
        EXECUTE pg_catalog.format(
            'REVOKE INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER ON ALL TABLES IN SCHEMA refarch FROM %I', one.name);
    END LOOP;
    FOR one IN
        SELECT g.part, g.name, c.oid::regclass AS relation, n.nspname AS relation_schema
        FROM refarch.granted g JOIN pg_catalog.pg_roles r ON r.rolname = g.name
        CROSS JOIN refarch.source s LEFT JOIN pg_catalog.pg_class c ON c.oid = s.relation
        LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LOOP
        FOR needed IN
            SELECT one.relation_schema WHERE one.relation_schema IS NOT NULL
            UNION SELECT n.nspname FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
                  WHERE e.extname = 'vector'
        LOOP
            -- Who owns neither may not grant, nor needs to where everybody has the right.
            IF NOT pg_catalog.has_schema_privilege(one.name, needed, 'USAGE') THEN
                EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA %I TO %I', needed, one.name);
            END IF;
        END LOOP;
        IF one.part = 'edit' THEN
            IF one.relation IS NOT NULL THEN
                EXECUTE pg_catalog.format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', one.relation, one.name);
            END IF;
            CONTINUE;
        END IF;
        EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA refarch TO %1$I; GRANT SELECT ON ALL TABLES IN SCHEMA refarch TO %1$I', one.name);
        IF one.relation IS NOT NULL THEN
            EXECUTE pg_catalog.format('GRANT SELECT ON %s TO %I', one.relation, one.name);
        END IF;
        FOR allowed IN
            SELECT c.relname, w.rights FROM refarch.writes() w
            JOIN pg_catalog.pg_class c ON c.relname ~ w.tables AND c.relnamespace = 'refarch'::regnamespace AND c.relkind = 'r'
            WHERE one.part = ANY (w.parts)
        LOOP
            EXECUTE pg_catalog.format('GRANT %s ON refarch.%I TO %I', allowed.rights, allowed.relname, one.name);
        END LOOP;
        SELECT pg_catalog.string_agg(p.oid::regprocedure::text, ', ') INTO functions
        FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'refarch'::regnamespace AND (
            p.proname IN ('tree', 'column_faults', 'unarmed', 'leaves')
            OR p.proname IN ('ring', 'backfill_step') AND one.part IN ('listen', 'embed', 'verify')
            OR p.proname IN ('distrust', 'queue_all', 'incarnation', 'rearm') AND one.part IN ('embed', 'verify')
            OR p.proname IN ('build_graph', 'drop_graph') AND one.part = 'embed');
        EXECUTE pg_catalog.format('GRANT EXECUTE ON FUNCTION %s TO %I', functions, one.name);
        IF pg_catalog.to_regclass('pgmq.meta') IS NOT NULL THEN
            EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA pgmq TO %1$I; GRANT SELECT ON pgmq.meta TO %1$I', one.name);
            SELECT pg_catalog.string_agg(pg_catalog.format('pgmq.%I', c.relname), ', ') INTO queues
            FROM pg_catalog.pg_class c
            WHERE c.relnamespace = 'pgmq'::regnamespace AND c.relkind IN ('r', 'p') AND EXISTS (
                SELECT FROM (
                    SELECT m.name FROM refarch.made m WHERE m.what = 'queue'
                    -- Queues that were there before, of somebody's making.
                    UNION SELECT q.name || '_' || lane FROM refarch.queue q, pg_catalog.unnest(ARRAY['live', 'bulk', 'dead']) AS lane
                          WHERE q.kind = 'pgmq') k(name)
                -- pgmq folds the names of its tables.
                WHERE c.relname IN ('q_' || pg_catalog.lower(k.name), 'a_' || pg_catalog.lower(k.name)));
            IF queues IS NOT NULL THEN
                EXECUTE pg_catalog.format('GRANT SELECT%s ON %s TO %I',
                    CASE WHEN one.part IN ('listen', 'embed') THEN ', INSERT, UPDATE, DELETE' ELSE '' END, queues, one.name);
            END IF;
        END IF;
    END LOOP;
END $$;
