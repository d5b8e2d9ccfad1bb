-- What came to a table's tree, or left it, is dealt with by itself: the other tables of the tree are not read anew.

-- Tables of a source's tree on which capture was armed. One that is missing here came to the tree since; one that is
-- here and not in the tree has left it.
CREATE TABLE refarch.source_leaf (
    source   text NOT NULL REFERENCES refarch.source ON DELETE CASCADE,
    relation regclass NOT NULL,
    PRIMARY KEY (source, relation)
);
-- By whatever version the triggers were made, and wherever they stand now.
INSERT INTO refarch.source_leaf (source, relation)
SELECT DISTINCT s.name, t.tgrelid::pg_catalog.regclass FROM refarch.source s, pg_catalog.pg_trigger t
JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
WHERE p.pronamespace = 'refarch'::pg_catalog.regnamespace AND NOT t.tgisinternal AND t.tgparentid = 0
  AND pg_catalog.starts_with(t.tgname::pg_catalog.text, 'refarch_' || s.name || '_');

-- leaf: the only table to read, of the tree; 0 for the whole tree. again: another request came after this round had
-- begun, so that another round follows; settle and expand are then of that one. cursor_of: the table, column and type
-- that the cursor is of.
ALTER TABLE refarch.backfill DROP CONSTRAINT backfill_pkey,
    ADD COLUMN leaf      regclass NOT NULL DEFAULT '-',
    ADD COLUMN again     boolean NOT NULL DEFAULT false,
    ADD COLUMN cursor_of text,
    ADD PRIMARY KEY (source, leaf);
-- The ledger was queued when the round began.
UPDATE refarch.backfill SET expand = false WHERE begun;

-- Tables of the tree that call for something. new: never armed. lost: armed before, and a trigger is missing, is
-- disabled or calls something else. gone: armed before, and not in the tree any more.
CREATE FUNCTION refarch.leaves(source text, root regclass) RETURNS TABLE (relation regclass, state text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH tree AS MATERIALIZED (SELECT t.relation FROM refarch.tree(leaves.root) t WHERE t.kind IN ('r', 'p')),
         armed AS MATERIALIZED (SELECT k.relation FROM refarch.source_leaf k WHERE k.source = leaves.source)
    SELECT tree.relation, 'new' FROM tree WHERE tree.relation NOT IN (SELECT armed.relation FROM armed)
    UNION ALL
    SELECT u.relation, 'lost' FROM refarch.unarmed(leaves.source, leaves.root) u(relation)
    WHERE u.relation IN (SELECT armed.relation FROM armed)
    UNION ALL
    SELECT armed.relation, 'gone' FROM armed WHERE armed.relation NOT IN (SELECT tree.relation FROM tree)
    ORDER BY 1
$$;

-- Forgets the tables that are gone; says whether there was any. Their rows left the source, and no trigger saw it.
CREATE FUNCTION refarch.forget_gone(wanted text, root regclass) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM refarch.source_leaf k WHERE k.source = wanted
        AND k.relation IN (SELECT l.relation FROM refarch.leaves(wanted, root) l WHERE l.state = 'gone');
    RETURN FOUND;
END $$;

-- Queues every id that the ledger knows, as a TRUNCATE does, so that rows that are gone are noticed.
CREATE FUNCTION refarch.expand_ledger(wanted text) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO refarch.outbox (source, op, ids) VALUES (expand_ledger.wanted, 't', '{}');
    SELECT refarch.ring();
$$;

-- Makes the triggers on one table that are missing, are disabled or call something else; says whether any was.
-- Triggers that stand already are left alone, so that this takes no lock then.
CREATE OR REPLACE FUNCTION refarch.put_triggers(source text, leaf regclass) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    kind text;
    fn text;
    made boolean := false;
BEGIN
    FOREACH kind IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
        fn := 'capture_' || source || '_' || kind;
        CONTINUE WHEN EXISTS (
            SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
            WHERE t.tgrelid = leaf AND t.tgname = 'refarch_' || source || '_' || kind
              AND p.proname = fn AND p.pronamespace = 'refarch'::regnamespace AND t.tgenabled IN ('O', 'A'));
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
    INSERT INTO refarch.source_leaf (source, relation) VALUES (source, leaf) ON CONFLICT DO NOTHING;
    RETURN made;
END $$;

-- Asks for every row of the source to be queued, from the start. A round that has begun goes on, so that requests that
-- come all the time let one end; another follows it.
CREATE OR REPLACE FUNCTION refarch.request_backfill(wanted text, settle boolean, expand boolean) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO refarch.backfill AS b (source, settle, expand)
    VALUES (request_backfill.wanted, request_backfill.settle, request_backfill.expand)
    ON CONFLICT (source, leaf) DO UPDATE SET requested_at = clock_timestamp(), again = b.begun,
        settle = b.settle OR excluded.settle, expand = b.expand OR excluded.expand,
        writers = CASE WHEN b.begun OR NOT excluded.settle THEN b.writers END
$$;

-- Asks for the rows of one table of the tree to be queued. A round over the whole tree that has yet to begin includes
-- them.
CREATE FUNCTION refarch.request_leaf(wanted text, leaf regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
BEGIN
    UPDATE refarch.backfill b SET settle = true, writers = CASE WHEN b.begun THEN b.writers END
    WHERE b.source = wanted AND b.leaf = '-'::regclass AND (NOT b.begun OR b.again);
    IF NOT FOUND THEN
        INSERT INTO refarch.backfill AS b (source, leaf, settle, expand) VALUES (wanted, request_leaf.leaf, true, false)
        ON CONFLICT (source, leaf) DO UPDATE SET requested_at = clock_timestamp(), again = b.begun,
            writers = CASE WHEN b.begun THEN b.writers END;
    END IF;
END $$;

-- Arms capture on one table of the tree, and asks for what that calls for; says whether anything was to be done.
-- A table that was armed before may have lost changes of every kind, and its rows are known by their ids only: the
-- whole source is read, and the ledger too if expand. One that came to the tree since has only rows to be queued.
CREATE FUNCTION refarch.arm_leaf(wanted text, root regclass, leaf regclass, expand boolean) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found_as constant text := (SELECT l.state FROM refarch.leaves(wanted, root) l WHERE l.relation = leaf AND l.state <> 'gone');
BEGIN
    -- Before the table is locked, since somebody may be at the request.
    IF found_as = 'lost' THEN
        PERFORM refarch.request_backfill(wanted, true, expand);
    ELSIF (SELECT c.relkind FROM pg_catalog.pg_class c WHERE c.oid = leaf) = 'r' AND found_as = 'new' THEN
        PERFORM refarch.request_leaf(wanted, leaf);
    END IF;
    IF found_as IS NOT NULL THEN
        PERFORM refarch.put_triggers(wanted, leaf);
    END IF;
    RETURN found_as IS NOT NULL;
END $$;

-- Queues up to so many pages of 500 rows of one request, which the caller has locked. Returns how many rows. why: what
-- keeps it from going on, if that is known. It is written down, and tried again by the next call.
CREATE FUNCTION refarch.serve_request(src refarch.source, request refarch.backfill, why text, pages integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    is_whole constant boolean := request.leaf = '-'::regclass;
    there constant regclass := CASE WHEN is_whole THEN src.relation ELSE request.leaf END;
    reads text;
    waiting integer;
    id_type text;
    id_expression text;
    greater_than text;
    less_than text;
    page_ids text[];
    row_count bigint := 0;
BEGIN
    -- Detached or dropped: its rows are not the source's any more.
    IF NOT is_whole AND NOT EXISTS (SELECT FROM refarch.tree(src.relation) t WHERE t.relation = there) THEN
        DELETE FROM refarch.backfill b WHERE b.source = src.name AND b.leaf = request.leaf;
        RETURN 0;
    END IF;
    IF why IS NOT NULL THEN
        NULL;
    ELSIF NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = src.relation) THEN
        why := pg_catalog.format('the table %s is gone', src.table_name);
    ELSE
        SELECT pg_catalog.format('the table %s has no column %I', src.relation, k.name) INTO why
        FROM pg_catalog.unnest(src.id_column || src.text_columns || src.metadata_columns) AS k(name)
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = src.relation
                          AND a.attname = k.name AND NOT a.attisdropped) LIMIT 1;
    END IF;
    IF why IS NULL THEN
        SELECT pg_catalog.format('%s/%s/%s', there::oid, a.attnum, a.atttypid) INTO reads FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = src.relation AND a.attname = src.id_column AND NOT a.attisdropped;
        IF request.begun AND request.cursor_of <> reads THEN
            -- The last id queued says nothing about the order of these.
            UPDATE refarch.backfill b SET begun = false, again = false, writers = NULL, cursor = NULL, queued = 0
            WHERE b.source = src.name AND b.leaf = request.leaf RETURNING b.* INTO request;
        END IF;
    END IF;
    IF why IS NULL AND request.settle AND NOT request.begun THEN
        IF request.writers IS NULL THEN
            request.writers := refarch.writers(there);
            UPDATE refarch.backfill b SET writers = request.writers WHERE b.source = src.name AND b.leaf = request.leaf;
        END IF;
        SELECT pg_catalog.count(*) INTO waiting FROM pg_catalog.unnest(request.writers) AS early(one)
        JOIN pg_catalog.unnest(refarch.writers(there)) AS still(one) USING (one);
        IF waiting > 0 THEN
            why := pg_catalog.format('%s transaction(s) that wrote to %s before are not over', waiting, there);
        END IF;
    END IF;
    -- The operators by which the unique index sorts: an extension's are not in pg_catalog.
    IF why IS NULL THEN
        SELECT pg_catalog.format_type(refarch.base_type(a.atttypid), -1),
               (SELECT pg_catalog.format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_catalog.pg_amop m
                JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace
                WHERE m.amopfamily = c.opcfamily AND m.amopstrategy = 5 AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype),
               (SELECT pg_catalog.format('OPERATOR(%I.%s)', n.nspname, o.oprname) FROM pg_catalog.pg_amop m
                JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr JOIN pg_catalog.pg_namespace n ON n.oid = o.oprnamespace
                WHERE m.amopfamily = c.opcfamily AND m.amopstrategy = 1 AND m.amoplefttype = c.opcintype AND m.amoprighttype = c.opcintype)
          INTO id_type, greater_than, less_than
        FROM pg_catalog.pg_index i
        JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attname = src.id_column
        JOIN pg_catalog.pg_opclass c ON c.oid = i.indclass[0]
        WHERE i.indrelid = src.relation AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1
        ORDER BY i.indisprimary DESC LIMIT 1;
        IF greater_than IS NULL OR less_than IS NULL THEN
            why := pg_catalog.format('column %I of %s has no unique index of its own any more', src.id_column, src.relation);
        END IF;
    END IF;
    IF why IS NULL THEN
        BEGIN
            id_expression := refarch.id_text(src.relation, src.id_column, 's');
            IF NOT request.begun AND request.expand THEN
                INSERT INTO refarch.outbox (source, op, ids) VALUES (src.name, 't', '{}');
            END IF;
            FOR page IN 1 .. serve_request.pages LOOP
                EXECUTE pg_catalog.format(
                    'SELECT pg_catalog.array_agg(k.id) FROM (SELECT %5$s AS id FROM %6$s %2$s s '
                    'WHERE s.%1$I IS NOT NULL%3$s ORDER BY s.%1$I USING %4$s LIMIT 500) k',
                    src.id_column, there,
                    CASE WHEN request.cursor IS NULL THEN ''
                         -- A literal of the type under any domain: neither a check nor a cast of anybody's is run.
                         ELSE pg_catalog.format(' AND s.%I %s CAST(%L AS %s)', src.id_column, greater_than, request.cursor, id_type) END,
                    less_than, id_expression, CASE WHEN NOT is_whole THEN 'ONLY' END) INTO page_ids;
                IF page_ids IS NOT NULL THEN
                    INSERT INTO refarch.outbox (source, op, ids) VALUES (src.name, 'u', page_ids);
                    row_count := row_count + pg_catalog.cardinality(page_ids);
                    request.cursor := page_ids[pg_catalog.cardinality(page_ids)];
                END IF;
                EXIT WHEN coalesce(pg_catalog.cardinality(page_ids), 0) < 500;
            END LOOP;
            IF coalesce(pg_catalog.cardinality(page_ids), 0) < 500 THEN
                IF request.again THEN
                    UPDATE refarch.backfill b SET begun = false, again = false, writers = NULL, cursor = NULL, queued = 0, held = NULL
                    WHERE b.source = src.name AND b.leaf = request.leaf;
                ELSE
                    DELETE FROM refarch.backfill b WHERE b.source = src.name AND b.leaf = request.leaf;
                END IF;
            ELSE
                UPDATE refarch.backfill b SET begun = true, expand = b.begun AND b.expand, cursor = request.cursor,
                       cursor_of = reads, queued = b.queued + row_count, held = NULL
                WHERE b.source = src.name AND b.leaf = request.leaf;
            END IF;
            IF row_count > 0 OR request.expand AND NOT request.begun THEN
                PERFORM refarch.ring();
            END IF;
        EXCEPTION WHEN OTHERS THEN
            row_count := 0;
            why := SQLERRM;
        END;
    END IF;
    IF why IS NOT NULL AND why IS DISTINCT FROM request.held THEN
        UPDATE refarch.backfill b SET held = why WHERE b.source = src.name AND b.leaf = request.leaf;
    END IF;
    RETURN row_count;
END $$;

-- Turns marks into a request, and queues up to so many pages of 500 rows of a request that is there: a new table of the
-- tree before the whole tree. Returns how many rows; -1 if it armed something instead, and is to be called again at
-- once. Another session may be at a request; then there is nothing to do about it here.
CREATE OR REPLACE FUNCTION refarch.backfill_step(wanted text, pages integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET row_security = off SET timezone = 'UTC' SET datestyle = 'ISO, YMD'
SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = 1 SET lc_monetary = 'C' AS $$
#variable_conflict use_column
DECLARE
    request refarch.backfill;
    src refarch.source;
    why text;
    row_count bigint := 0;
BEGIN
    SELECT s.* INTO src FROM refarch.source s WHERE s.name = backfill_step.wanted;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF EXISTS (SELECT FROM refarch.mark m WHERE m.source = src.name) THEN
        -- As a migration does, before anything else is locked; during one there is nothing to do here.
        IF NOT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtext('refarch.migrate')) THEN
            RETURN 0;
        END IF;
        -- A column that only a generated one is made of may have another name now. Unless capture can be armed
        -- anew, each statement leaves another mark, and reading the table now would be in vain.
        BEGIN
            IF refarch.rearm(src.name) THEN
                -- Rows are read when the table's lock is let go. The marks stay until nothing is left to arm.
                RETURN -1;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            why := SQLERRM;
        END;
        DELETE FROM refarch.mark m WHERE m.source = src.name;
        PERFORM refarch.request_backfill(src.name, false, true);
        SELECT s.* INTO src FROM refarch.source s WHERE s.name = backfill_step.wanted;
    END IF;
    FOR request IN
        SELECT b.* FROM refarch.backfill b WHERE b.source = src.name ORDER BY b.leaf = '-'::regclass, b.leaf FOR UPDATE SKIP LOCKED
    LOOP
        row_count := refarch.serve_request(src, request, why, backfill_step.pages);
        EXIT WHEN row_count > 0;
    END LOOP;
    RETURN row_count;
END $$;

-- Arms capture again where it is not as it should be, one table a call, and asks for what that calls for. Says
-- whether something was done: then it is to be called again, in another transaction. One that held locks on two
-- tables could meet the application's, which would fail. Runs as the role that migrated. Fails when a column or the table is missing, since only settings and
-- "refarch migrate" can mend that, and when the table is in use for longer than a second.
CREATE OR REPLACE FUNCTION refarch.rearm(source text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    src refarch.source;
    there regclass;
    missing text;
    leaf regclass;
    changed boolean := false;
    is_smaller boolean;
BEGIN
    PERFORM pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('refarch.migrate'));
    SELECT s.* INTO src FROM refarch.source s WHERE s.name = rearm.source FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no source %: run refarch migrate', rearm.source;
    END IF;
    there := pg_catalog.to_regclass(src.table_name);
    IF there IS NULL THEN
        RAISE EXCEPTION 'there is no table %: name the right one in source.table and run refarch migrate', src.table_name;
    END IF;
    SELECT k.name INTO missing
    FROM pg_catalog.unnest(src.id_column || src.text_columns || src.metadata_columns) AS k(name)
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = there AND a.attname = k.name AND NOT a.attisdropped);
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION 'table % has no column %: name the right one in the settings and run refarch migrate', src.table_name, missing;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_index i
                   JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                   WHERE i.indrelid = there AND a.attname = src.id_column AND a.attnotnull AND i.indisunique
                     AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1) THEN
        RAISE EXCEPTION 'column % of % is not unique by itself and never null: add a primary key', src.id_column, src.table_name;
    END IF;
    IF there <> src.relation OR EXISTS (SELECT FROM refarch.column_faults(src.name, there)) THEN
        UPDATE refarch.source s SET relation = there WHERE s.name = src.name;
        PERFORM refarch.make_capture(src.name, there, src.id_column, src.watched);
        PERFORM refarch.note_columns(src.name, there, src.id_column, src.watched);
        changed := true;
    END IF;
    is_smaller := refarch.forget_gone(src.name, there);
    IF changed THEN
        PERFORM refarch.request_backfill(src.name, true, true);
    ELSIF is_smaller THEN
        PERFORM refarch.expand_ledger(src.name);
    END IF;
    -- A request for the whole tree includes the new ones, if it comes first.
    SELECT l.relation INTO leaf FROM refarch.leaves(src.name, there) l ORDER BY l.state, l.relation LIMIT 1;
    IF leaf IS NOT NULL THEN
        RETURN refarch.arm_leaf(src.name, there, leaf, true);
    END IF;
    SELECT u INTO leaf FROM refarch.strays(src.name, there) u LIMIT 1;
    IF leaf IS NOT NULL THEN
        PERFORM refarch.disarm(src.name, leaf);
        RETURN true;
    END IF;
    RETURN changed OR is_smaller;
END $$;

-- Gives the roles in refarch.granted what their parts need, and nobody else the right to call our functions. Run by
-- each migration, so that tables and functions that came later are told of, too.
CREATE OR REPLACE FUNCTION refarch.give_rights() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    one record;
    tables text;
    functions text;
    queues text;
    needed name;
BEGIN
    REVOKE ALL ON ALL FUNCTIONS IN SCHEMA refarch FROM PUBLIC;
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
        -- What a part writes to. All write to the books that are not named here: workers, events, samples, faults.
        SELECT pg_catalog.string_agg(pg_catalog.format('refarch.%I', c.relname), ', ') INTO tables
        FROM pg_catalog.pg_class c
        WHERE c.relnamespace = 'refarch'::regnamespace AND c.relkind = 'r' AND c.relname NOT IN (
            'source', 'source_column', 'source_leaf', 'target', 'migration', 'made', 'granted', 'queue', 'backfill', 'mark')
          AND CASE
            WHEN c.relname IN ('shipment', 'packing', 'doorbell') THEN one.part = 'listen'
            WHEN c.relname = 'outbox' THEN one.part IN ('listen', 'embed', 'verify')
            WHEN c.relname IN ('ledger', 'lineage') THEN one.part IN ('embed', 'verify')
            WHEN c.relname = 'attempt' OR c.relname ~ '^vector_[0-9]+$' THEN one.part = 'embed'
            ELSE true
          END;
        EXECUTE pg_catalog.format('GRANT INSERT, UPDATE, DELETE ON %s TO %I', tables, one.name);
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
