-- Capture that neither fails nor delays the application's statement.
--
-- What a trigger of ours can raise inside the application's transaction, and why it does not:
--   * a column that was renamed or dropped: the body looks for the names first, and if one is missing leaves a
--     mark ("this source must be read anew") in place of the ids. A static statement is planned only when it is
--     reached, so that a name that is missing is no error before that;
--   * an operator that an extension's type does not have in pg_catalog: ids are compared as text, byte by byte,
--     and rows by their images (*<>);
--   * a type, table or function of the writer's own in place of ours: pg_temp is searched last, and each name
--     outside of pg_catalog has its schema; a variable that has a column's name: there are no variables;
--   * NOTIFY when a transaction is prepared for two-phase commit: it is not sent where such transactions are
--     allowed at all; the relay's poll finds the change;
--   * NOTIFY when the server's queue of notifications is full, at commit: it is not sent once half of it is used;
--   * a right that the writer's role lacks: the functions run as their owner, who owns the tables they write to;
--   * a constraint: op is a constant, ids are never null, and the numbers have 64 bits;
--   * a failure to serialize: a SERIALIZABLE writer reads refarch.doorbell, which only transactions that are
--     READ COMMITTED write to, and these take part in no such conflict; system catalogs take part in none;
--   * a lock: the tables written to are only inserted into and deleted from. A later migration must not ALTER,
--     and an operator must not LOCK or VACUUM FULL, refarch.outbox, refarch.mark and refarch.doorbell under writers;
--   * what is left fails the statement without us, too: no space, no memory, statement_timeout, and
--     temp_file_limit, toward which the copies of the changed rows count that PostgreSQL keeps for the trigger.

-- The table's name as the settings have it, with its schema, to notice another table under that name; and the
-- columns whose change matters. No trigger reads refarch.source.
ALTER TABLE refarch.source ADD COLUMN table_name text, ADD COLUMN watched text[];
UPDATE refarch.source s SET
    table_name = (SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
                  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = s.relation),
    watched = s.text_columns || s.metadata_columns;

-- The columns as they were when capture was armed. attnum tells a renamed column from a new one.
CREATE TABLE refarch.source_column (
    source text NOT NULL REFERENCES refarch.source ON DELETE CASCADE,
    name   text NOT NULL,
    number smallint NOT NULL,
    type   text NOT NULL,
    PRIMARY KEY (source, name)
);

-- Left by a trigger that could not tell which rows changed. The relay makes a request of it.
CREATE TABLE refarch.mark (
    seq    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source text NOT NULL,
    at     timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- Tables that are to be read anew, row by row, in id order. cursor: the last id queued. settle: wait for the
-- transactions that write to the table now, since they may run functions from before the request. expand: queue
-- what the ledger knows, too, so that rows that are gone are noticed. held: why it does not go on.
CREATE TABLE refarch.backfill (
    source       text PRIMARY KEY REFERENCES refarch.source ON DELETE CASCADE,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    settle       boolean NOT NULL DEFAULT false,
    writers      text[],
    expand       boolean NOT NULL DEFAULT true,
    begun        boolean NOT NULL DEFAULT false,
    cursor       text,
    queued       bigint NOT NULL DEFAULT 0,
    held         text
) WITH (fillfactor = 10);

-- Which queue the changes travel on, so that another one is noticed.
CREATE TABLE refarch.queue (
    single   boolean PRIMARY KEY DEFAULT true CHECK (single),
    kind     text NOT NULL,
    name     text NOT NULL,
    noted_at timestamptz NOT NULL DEFAULT now()
);

-- Roles of the database that were given the rights of a role of ours, so that tables made later are theirs too.
CREATE TABLE refarch.granted (
    part text NOT NULL,
    name text NOT NULL,
    PRIMARY KEY (part, name)
);

-- The notification that wakes a sleeping relay. The triggers hold the same lines themselves.
CREATE OR REPLACE FUNCTION refarch.ring() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF coalesce((SELECT d.asleep FROM refarch.doorbell d), true)
       AND pg_catalog.current_setting('max_prepared_transactions') = '0'
       AND pg_catalog.pg_notification_queue_usage() < 0.5 THEN
        PERFORM pg_catalog.pg_notify('refarch_outbox', '');
    END IF;
END $$;

-- A table and all below it: partitions and inheritance children.
CREATE FUNCTION refarch.tree(root regclass) RETURNS TABLE (relation regclass, kind "char")
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE tree(oid) AS (
        SELECT root::oid
        UNION
        SELECT i.inhrelid FROM tree JOIN pg_catalog.pg_inherits i ON i.inhparent = tree.oid
    )
    SELECT c.oid::regclass, c.relkind FROM tree JOIN pg_catalog.pg_class c USING (oid)
$$;

-- The columns to compare in place of those given. A virtual generated column has no value in what a trigger
-- sees: the columns that it is made of stand for it, and such a column can't be made of another one.
CREATE FUNCTION refarch.compared(relation regclass, watched text[]) RETURNS text[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(name ORDER BY name), '{}') FROM (
        SELECT w.name FROM unnest(watched) AS w(name)
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a WHERE a.attrelid = relation AND a.attname = w.name
                          AND NOT a.attisdropped AND a.attgenerated = 'v')
        UNION
        SELECT b.attname::text FROM pg_catalog.pg_attribute a
        JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        JOIN pg_catalog.pg_depend p ON p.classid = 'pg_catalog.pg_attrdef'::regclass AND p.objid = d.oid
            AND p.refclassid = 'pg_catalog.pg_class'::regclass AND p.refobjid = a.attrelid AND p.refobjsubid NOT IN (0, a.attnum)
        JOIN pg_catalog.pg_attribute b ON b.attrelid = a.attrelid AND b.attnum = p.refobjsubid
        WHERE a.attrelid = relation AND a.attname = ANY (watched) AND NOT a.attisdropped AND a.attgenerated = 'v'
    ) k(name)
$$;

-- Writes down the columns as they are.
CREATE FUNCTION refarch.note_columns(wanted text, relation regclass, id_column text, watched text[]) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM refarch.source_column c WHERE c.source = note_columns.wanted;
    INSERT INTO refarch.source_column (source, name, number, type)
    SELECT note_columns.wanted, a.attname::text, a.attnum, format_type(a.atttypid, a.atttypmod)
    FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = note_columns.relation AND NOT a.attisdropped AND a.attnum > 0
      AND (a.attname = note_columns.id_column OR a.attname = ANY (note_columns.watched)
           OR a.attname = ANY (refarch.compared(note_columns.relation, note_columns.watched)))
$$;
DO $$
DECLARE
    src record;
BEGIN
    FOR src IN SELECT s.* FROM refarch.source s JOIN pg_catalog.pg_class c ON c.oid = s.relation LOOP
        PERFORM refarch.note_columns(src.name, src.relation, src.id_column, src.watched);
    END LOOP;
END $$;

-- The type under a domain, or the type itself.
CREATE FUNCTION refarch.base_type(wanted oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE under(oid, base) AS (
        SELECT t.oid, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = wanted
        UNION
        SELECT t.oid, t.typbasetype FROM under JOIN pg_catalog.pg_type t ON t.oid = under.base
    )
    SELECT u.oid FROM under u WHERE u.base = 0
$$;

-- How an id is turned into text by functions that run as their owner, whatever the owner of the table or of the type
-- did: a cast may be a function of theirs. A type that PostgreSQL, a superuser or the owner of these functions made has
-- the casts that they gave it; another one is printed by its output function, which no cast replaces. A type that
-- is made of others is refused, since their domains may have checks.
CREATE FUNCTION refarch.id_text(relation regclass, id_column text, alias text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    kind record;
BEGIN
    SELECT t.*, format_type(t.oid, NULL) AS name,
           t.typnamespace = 'pg_catalog'::regnamespace OR r.rolsuper OR r.rolname = current_user AS trusted,
           EXISTS (SELECT FROM pg_catalog.pg_cast k JOIN pg_catalog.pg_proc p ON p.oid = k.castfunc
                   JOIN pg_catalog.pg_roles o ON o.oid = p.proowner
                   WHERE k.castsource = t.oid AND k.casttarget = 'pg_catalog.text'::regtype
                     AND p.pronamespace <> 'pg_catalog'::regnamespace AND NOT o.rolsuper AND o.rolname <> current_user) AS cast_by_others
      INTO kind
    FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = refarch.base_type(a.atttypid)
    LEFT JOIN pg_catalog.pg_roles r ON r.oid = t.typowner
    WHERE a.attrelid = id_text.relation AND a.attname = id_text.id_column AND NOT a.attisdropped;
    IF kind.cast_by_others THEN
        RAISE EXCEPTION 'the id % of % has the type %, whose cast to text is a function of another role: drop that cast',
            id_column, relation, kind.name;
    END IF;
    IF NOT kind.trusted AND (kind.typtype NOT IN ('b', 'e') OR kind.typcategory = 'A') THEN
        RAISE EXCEPTION 'the id % of % has the type %, which is made of others: an id must be of a plain type',
            id_column, relation, kind.name;
    END IF;
    RETURN CASE WHEN kind.trusted THEN pg_catalog.format('CAST(%s.%I AS pg_catalog.text)', alias, id_column)
        ELSE pg_catalog.format('CASE WHEN %1$s.%2$I IS NOT NULL THEN pg_catalog.format(''%%s'', %1$s.%2$I) END', alias, id_column) END;
END $$;

-- Makes the functions that the triggers call. Takes no lock on the table.
CREATE FUNCTION refarch.make_capture(source text, relation regclass, id_column text, watched text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $make$
#variable_conflict use_variable
DECLARE
    -- Types whose text is the same in every session; a SET costs the writer time.
    plain constant regtype[] := ARRAY['int2', 'int4', 'int8', 'numeric', 'uuid', 'text', 'varchar', 'bpchar', 'bool', 'name', 'oid']::regtype[];
    compared text[] := refarch.compared(relation, watched);
    id_type constant oid := (SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid = relation AND a.attname = id_column
                             AND NOT a.attisdropped);
    is_plain constant boolean := coalesce(refarch.base_type(id_type) = ANY (plain::oid[]), false);
    -- The id may become wider or narrower; of another type, whose cast may be anybody's, it is not read.
    id_types constant oid[] := id_type || CASE WHEN is_plain THEN plain::oid[] END;
    -- Byte by byte: an id that differs in case only is another id, whatever its type or collation holds equal.
    id_of constant text := refarch.id_text(relation, id_column, 'x') || ' COLLATE pg_catalog."C" AS id';
    -- Chunks of 500 in the order of the transition table.
    pack constant text := 'INSERT INTO refarch.outbox (source, op, ids) '
        'SELECT %L, k.op, pg_catalog.array_agg(k.id) FROM ('
        'SELECT c.op, c.id, (pg_catalog.row_number() OVER (PARTITION BY c.op) - 1) / 500 AS chunk FROM (%s) c '
        'WHERE c.id IS NOT NULL) k GROUP BY k.op, k.chunk;';
    -- A transaction with one snapshot for all of its statements sees the catalog as it was: there the rows
    -- themselves tell the type, and what is missing is an error that is caught.
    body constant text := '
#variable_conflict use_column
BEGIN
    IF pg_catalog.current_setting(''transaction_isolation'') = ''read committed'' THEN
        IF (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute a WHERE a.attrelid = TG_RELID
            AND a.attname = ANY (%1$L::pg_catalog.name[]) AND NOT a.attisdropped
            AND (a.attname <> %2$L OR a.atttypid = ANY (%3$L::pg_catalog.oid[]))) = %4$s THEN
            %5$s
        ELSE
            INSERT INTO refarch.mark (source) VALUES (%6$L);
        END IF;
    ELSE
        BEGIN
            IF %7$s THEN
                %5$s
            ELSE
                INSERT INTO refarch.mark (source) VALUES (%6$L);
            END IF;
        EXCEPTION WHEN undefined_column OR undefined_table OR undefined_object OR undefined_function OR cannot_coerce THEN
            INSERT INTO refarch.mark (source) VALUES (%6$L);
        END;
    END IF;
    IF FOUND AND coalesce((SELECT d.asleep FROM refarch.doorbell d), true)
       AND pg_catalog.current_setting(''max_prepared_transactions'') = ''0''
       AND pg_catalog.pg_notification_queue_usage() < 0.5 THEN
        PERFORM pg_catalog.pg_notify(''refarch_outbox'', '''');
    END IF;
    RETURN NULL;
END';
    spelling text := '';
    columns text;
    old_values text;
    new_values text;
    kind text;
    names text[];
    work text;
    guard text;
BEGIN
    -- A virtual column that is made of no column: what is left to see is the id.
    IF pg_catalog.cardinality(compared) = 0 THEN
        compared := ARRAY[id_column];
    END IF;
    IF NOT is_plain THEN
        spelling := ' SET timezone TO ''UTC'' SET datestyle TO ''ISO, YMD'' SET intervalstyle TO ''postgres'''
            ' SET bytea_output TO ''hex'' SET extra_float_digits TO 1 SET lc_monetary TO ''C''';
    END IF;
    -- *<> compares images: it tells every difference apart, of every type, and nulls from values.
    SELECT pg_catalog.string_agg(pg_catalog.format('x.%I AS c%s', w.name, w.place), ', '),
           pg_catalog.string_agg(pg_catalog.format('o.c%s', w.place), ', '),
           pg_catalog.string_agg(pg_catalog.format('n.c%s', w.place), ', ')
      INTO columns, old_values, new_values FROM pg_catalog.unnest(compared) WITH ORDINALITY AS w(name, place);
    FOREACH kind IN ARRAY ARRAY['insert', 'delete', 'update', 'truncate'] LOOP
        names := CASE kind WHEN 'truncate' THEN '{}' WHEN 'update' THEN compared ELSE ARRAY[id_column] END;
        IF kind = 'update' AND NOT id_column = ANY (names) THEN
            names := names || id_column;
        END IF;
        work := CASE kind
            WHEN 'insert' THEN pg_catalog.format(pack, source,
                'SELECT ''u''::pg_catalog."char" AS op, ' || id_of || ' FROM new_rows x')
            WHEN 'delete' THEN pg_catalog.format(pack, source,
                'SELECT ''d''::pg_catalog."char" AS op, ' || id_of || ' FROM old_rows x')
            -- An id that went is a delete, one that came an upsert.
            WHEN 'update' THEN pg_catalog.format(pack, source,
                'SELECT CASE WHEN n.id IS NULL THEN ''d''::pg_catalog."char" ELSE ''u''::pg_catalog."char" END AS op, '
                'coalesce(n.id, o.id) AS id FROM (SELECT ' || id_of || ', ' || columns || ' FROM old_rows x) o '
                'FULL JOIN (SELECT ' || id_of || ', ' || columns || ' FROM new_rows x) n ON o.id OPERATOR(pg_catalog.=) n.id '
                'WHERE o.id IS NULL OR n.id IS NULL OR ROW(' || old_values || ')::pg_catalog.record '
                'OPERATOR(pg_catalog.*<>) ROW(' || new_values || ')::pg_catalog.record')
            ELSE pg_catalog.format('INSERT INTO refarch.outbox (source, op, ids) VALUES (%L, ''t'', ''{}'');', source)
        END;
        guard := CASE kind WHEN 'truncate' THEN 'true' ELSE pg_catalog.format(
            'coalesce((SELECT CAST(pg_catalog.pg_typeof(x.%I) AS pg_catalog.oid) = ANY (%L::pg_catalog.oid[]) FROM %s x LIMIT 1), true)',
            id_column, id_types, CASE kind WHEN 'delete' THEN 'old_rows' ELSE 'new_rows' END) END;
        EXECUTE pg_catalog.format(
            'CREATE OR REPLACE FUNCTION refarch.%I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
            'SET search_path = pg_catalog, pg_temp%s AS %L',
            'capture_' || source || '_' || kind, spelling,
            pg_catalog.format(body, names, id_column, id_types, pg_catalog.cardinality(names), work, source, guard));
    END LOOP;
END $make$;

-- Makes the triggers on one table that are missing, are disabled or call something else; says whether any was.
-- Triggers that stand already are left alone, so that this takes no lock then.
CREATE FUNCTION refarch.put_triggers(source text, leaf regclass) RETURNS boolean
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
    RETURN made;
END $$;

-- Arms capture on a table and on every table below it, and returns those on which a trigger was made.
CREATE OR REPLACE FUNCTION refarch.arm(source text, relation regclass, id_column text, watched text[])
RETURNS SETOF regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    leaf regclass;
BEGIN
    PERFORM refarch.make_capture(source, relation, id_column, watched);
    FOR leaf IN SELECT t.relation FROM refarch.tree(relation) t WHERE t.kind IN ('r', 'p') LOOP
        IF refarch.put_triggers(source, leaf) THEN
            RETURN NEXT leaf;
        END IF;
    END LOOP;
END $$;

-- Tables on which triggers of a source stand though they are not in its tree: known by the functions that they call.
CREATE FUNCTION refarch.strays(source text, root regclass) RETURNS SETOF regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT DISTINCT t.tgrelid::regclass FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
    WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND p.pronamespace = 'refarch'::regnamespace
      AND p.proname IN ('capture_' || strays.source || '_insert', 'capture_' || strays.source || '_update',
                        'capture_' || strays.source || '_delete', 'capture_' || strays.source || '_truncate')
      AND t.tgrelid NOT IN (SELECT k.relation FROM refarch.tree(strays.root) k)
    ORDER BY 1
$$;

-- Takes our triggers of a source off one table.
CREATE FUNCTION refarch.disarm(source text, leaf regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    named name;
BEGIN
    FOR named IN
        SELECT t.tgname FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
        WHERE t.tgrelid = leaf AND NOT t.tgisinternal AND t.tgparentid = 0 AND p.pronamespace = 'refarch'::regnamespace
          AND p.proname IN ('capture_' || source || '_insert', 'capture_' || source || '_update',
                            'capture_' || source || '_delete', 'capture_' || source || '_truncate')
        ORDER BY t.tgname
    LOOP
        EXECUTE pg_catalog.format('DROP TRIGGER %I ON %s', named, leaf);
    END LOOP;
END $$;

-- Tables of the tree whose triggers are missing, are disabled or call something else.
CREATE FUNCTION refarch.unarmed(source text, root regclass) RETURNS SETOF regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT k.relation FROM refarch.tree(unarmed.root) k
    WHERE k.kind IN ('r', 'p') AND EXISTS (
        SELECT FROM unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS kind WHERE NOT EXISTS (
            SELECT FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
            WHERE t.tgrelid = k.relation AND t.tgname = 'refarch_' || unarmed.source || '_' || kind
              AND p.proname = 'capture_' || unarmed.source || '_' || kind
              AND p.pronamespace = 'refarch'::regnamespace AND t.tgenabled IN ('O', 'A')))
    ORDER BY 1
$$;

-- Asks for every row of the table to be queued, from the start.
CREATE FUNCTION refarch.request_backfill(wanted text, settle boolean, expand boolean) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO refarch.backfill AS b (source, settle, expand)
    VALUES (request_backfill.wanted, request_backfill.settle, request_backfill.expand)
    ON CONFLICT (source) DO UPDATE SET requested_at = clock_timestamp(), settle = b.settle OR excluded.settle,
        expand = b.expand OR excluded.expand, writers = NULL, begun = false, cursor = NULL, queued = 0, held = NULL
$$;

-- Transactions that hold a lock on the table under which they may have written to it.
CREATE FUNCTION refarch.writers(root regclass) RETURNS text[]
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}') FROM pg_catalog.pg_locks l
    WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
      AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database())
      AND l.relation IN (SELECT t.relation FROM refarch.tree(root) t)
      AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
$$;

-- Turns marks into a request, and queues up to so many pages of 500 rows of the request that is there. Returns
-- how many rows; -1 if it armed something instead, and is to be called again at once. Another session may be at it; then there is nothing to do here. What keeps it from going on is
-- written down, and tried again by the next call.
CREATE FUNCTION refarch.backfill_step(wanted text, pages integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET row_security = off SET timezone = 'UTC' SET datestyle = 'ISO, YMD'
SET intervalstyle = 'postgres' SET bytea_output = 'hex' SET extra_float_digits = 1 SET lc_monetary = 'C' AS $$
#variable_conflict use_column
DECLARE
    request refarch.backfill;
    src refarch.source;
    why text;
    waiting integer;
    id_type text;
    id_expression text;
    greater_than text;
    less_than text;
    page_ids text[];
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
    SELECT b.* INTO request FROM refarch.backfill b WHERE b.source = src.name FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
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
    IF why IS NULL AND request.settle AND NOT request.begun THEN
        IF request.writers IS NULL THEN
            request.writers := refarch.writers(src.relation);
            UPDATE refarch.backfill b SET writers = request.writers WHERE b.source = src.name;
        END IF;
        SELECT pg_catalog.count(*) INTO waiting FROM pg_catalog.unnest(request.writers) AS early(one)
        JOIN pg_catalog.unnest(refarch.writers(src.relation)) AS still(one) USING (one);
        IF waiting > 0 THEN
            why := pg_catalog.format('%s transaction(s) that wrote to %s before are not over', waiting, src.relation);
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
            FOR page IN 1 .. backfill_step.pages LOOP
                EXECUTE pg_catalog.format(
                    'SELECT pg_catalog.array_agg(k.id) FROM (SELECT %5$s AS id FROM %2$s s '
                    'WHERE s.%1$I IS NOT NULL%3$s ORDER BY s.%1$I USING %4$s LIMIT 500) k',
                    src.id_column, src.relation,
                    CASE WHEN request.cursor IS NULL THEN ''
                         -- A literal of the type under any domain: neither a check nor a cast of anybody's is run.
                         ELSE pg_catalog.format(' AND s.%I %s CAST(%L AS %s)', src.id_column, greater_than, request.cursor, id_type) END,
                    less_than, id_expression) INTO page_ids;
                IF page_ids IS NOT NULL THEN
                    INSERT INTO refarch.outbox (source, op, ids) VALUES (src.name, 'u', page_ids);
                    row_count := row_count + pg_catalog.cardinality(page_ids);
                    request.cursor := page_ids[pg_catalog.cardinality(page_ids)];
                END IF;
                EXIT WHEN coalesce(pg_catalog.cardinality(page_ids), 0) < 500;
            END LOOP;
            IF coalesce(pg_catalog.cardinality(page_ids), 0) < 500 THEN
                DELETE FROM refarch.backfill b WHERE b.source = src.name;
            ELSE
                UPDATE refarch.backfill b SET begun = true, cursor = request.cursor, queued = b.queued + row_count, held = NULL
                WHERE b.source = src.name;
            END IF;
            IF row_count > 0 OR request.expand THEN
                PERFORM refarch.ring();
            END IF;
        EXCEPTION WHEN OTHERS THEN
            row_count := 0;
            why := SQLERRM;
        END;
    END IF;
    IF why IS NOT NULL AND why IS DISTINCT FROM request.held THEN
        UPDATE refarch.backfill b SET held = why WHERE b.source = src.name;
    END IF;
    RETURN row_count;
END $$;

-- Puts every row of the table and every entry of the ledger into the outbox as not to be trusted.
CREATE OR REPLACE FUNCTION refarch.distrust(wanted integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    named text;
    step bigint;
    queued bigint := 0;
BEGIN
    SELECT t.source INTO named FROM refarch.target t WHERE t.id = wanted;
    -- In id order, as every other writer of the ledger locks it.
    PERFORM 1 FROM refarch.ledger l WHERE l.target = wanted ORDER BY l.id COLLATE "C" FOR UPDATE;
    UPDATE refarch.ledger l SET epoch = l.epoch + 1, dirty = true, content_hash = NULL, metadata_hash = NULL,
           deleted = false, parked = false WHERE l.target = wanted;
    PERFORM refarch.request_backfill(named, false, true);
    -- What is held is left to the relay.
    LOOP
        step := refarch.backfill_step(named, 100);
        queued := queued + greatest(step, 0);
        EXIT WHEN step <= 0;
    END LOOP;
    RETURN queued;
END $$;
DROP FUNCTION refarch.backfill(text, regclass, text);

-- What differs between the table as capture was armed on it and as it is: sentences.
CREATE FUNCTION refarch.column_faults(wanted text, relation regclass) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE
        WHEN a.attnum IS NULL AND b.attnum IS NOT NULL THEN format('column %I is now named %I', c.name, b.attname)
        WHEN a.attnum IS NULL THEN format('column %I is gone', c.name)
        WHEN a.attnum <> c.number THEN format('column %I is another one than before', c.name)
        ELSE format('column %I was %s and is now %s', c.name, c.type, format_type(a.atttypid, a.atttypmod))
    END
    FROM refarch.source_column c
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = column_faults.relation AND a.attname = c.name AND NOT a.attisdropped
    LEFT JOIN pg_catalog.pg_attribute b ON b.attrelid = column_faults.relation AND b.attnum = c.number AND NOT b.attisdropped
    WHERE c.source = column_faults.wanted
      AND (a.attnum IS NULL OR a.attnum <> c.number OR format_type(a.atttypid, a.atttypmod) <> c.type)
    ORDER BY c.number
$$;

-- Arms capture again where it is not as it should be, one table a call, and asks for the table to be read anew. Says
-- whether something was done: then it is to be called again, in another transaction. One that held locks on two
-- tables could meet the application's, which would fail. Runs as the role that migrated. Fails when a column or the table is missing, since only settings and
-- "refarch migrate" can mend that, and when the table is in use for longer than a second.
CREATE FUNCTION refarch.rearm(source text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '1s' AS $$
#variable_conflict use_column
DECLARE
    src refarch.source;
    there regclass;
    missing text;
    leaf regclass;
    changed boolean := false;
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
    SELECT u INTO leaf FROM refarch.unarmed(src.name, there) u LIMIT 1;
    IF changed OR leaf IS NOT NULL THEN
        -- Before the table is locked, since somebody may be at the request.
        PERFORM refarch.request_backfill(src.name, true, true);
    END IF;
    IF leaf IS NOT NULL THEN
        PERFORM refarch.put_triggers(src.name, leaf);
        RETURN true;
    END IF;
    SELECT u INTO leaf FROM refarch.strays(src.name, there) u LIMIT 1;
    IF leaf IS NOT NULL THEN
        PERFORM refarch.disarm(src.name, leaf);
        RETURN true;
    END IF;
    RETURN changed;
END $$;

-- The graph over a target's vectors, for a role that does not own their table. A function can't build an index
-- CONCURRENTLY: writes of vectors wait meanwhile, searches do not, and no table of the user's is touched. The owner
-- builds it CONCURRENTLY, without this.
CREATE FUNCTION refarch.build_graph(wanted integer, degree integer, candidates integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    extension_schema text;
BEGIN
    SELECT n.nspname INTO extension_schema FROM refarch.target t, pg_catalog.pg_extension e
    JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE t.id = wanted AND e.extname = 'vector';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no target % with vectors', wanted;
    END IF;
    EXECUTE pg_catalog.format(
        'CREATE INDEX IF NOT EXISTS vector_%1$s_graph ON refarch.vector_%1$s USING hnsw (embedding %2$I.halfvec_cosine_ops) '
        'WITH (m = %3$s, ef_construction = %4$s)', wanted, extension_schema, degree, candidates);
END $$;
CREATE FUNCTION refarch.drop_graph(wanted integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
BEGIN
    EXECUTE pg_catalog.format('DROP INDEX IF EXISTS refarch.vector_%s_graph', wanted);
END $$;

-- Gives the roles in refarch.granted what their parts need, and nobody else the right to call our functions. Run by
-- each migration, so that tables and functions that came later are told of, too.
CREATE FUNCTION refarch.give_rights() RETURNS void
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
            'source', 'source_column', 'target', 'migration', 'made', 'granted', 'queue', 'backfill', 'mark')
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
            p.proname IN ('tree', 'column_faults')
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
