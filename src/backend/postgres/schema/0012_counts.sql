-- Counts that are kept, so that the status does not read a million entries.
--
-- A row is what one statement changed; a target's counts are the sums over its rows. Writers only insert, each in its own
-- transaction. So no writer waits for another, and a statement that is rolled back, or lost in a crash, takes its row with
-- it: the sums are exact in every snapshot. A worker replaces many rows by their sum now and then. What happens while the
-- triggers are off no sum can show; the proof and "refarch verify" count anew.
CREATE TABLE refarch.count_delta (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- No foreign key: each insert would lock the target's row. A worker deletes what is left of a target that is gone.
    target    integer NOT NULL,
    -- Entries that are settled and not of deleted rows, those of them with a text, and entries that are not settled.
    settled   bigint NOT NULL DEFAULT 0,
    with_text bigint NOT NULL DEFAULT 0,
    unsettled bigint NOT NULL DEFAULT 0,
    -- Vectors of an index in this database.
    records   bigint NOT NULL DEFAULT 0
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 10000,
    autovacuum_vacuum_cost_delay = 0
);

-- The content hash of an empty text: see ContentSalt in src/pipeline/source_row.rs.
CREATE FUNCTION refarch.textless_hash(salt text) RETURNS bytea
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sha256(convert_to(salt, 'UTF8') || '\x00'::bytea)
$$;

-- Triggers on the ledger. They run as the owner, so that a worker's role needs no right of its own here. Entries of a target
-- that is being deleted are not counted: its row is gone already.
DO $make$
DECLARE
    head constant text := 'CREATE FUNCTION refarch.count_entries_%s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
        'SET search_path = pg_catalog, pg_temp AS $t$ BEGIN INSERT INTO refarch.count_delta (target, settled, with_text, unsettled) ';
    tail constant text := '; RETURN NULL; END $t$';
    sums constant text :=
        'WITH k AS MATERIALIZED (SELECT t.id, refarch.textless_hash(t.salt) AS textless FROM refarch.target t) '
        'SELECT s.* FROM (SELECT e.target, '
        'sum(e.sign * (e.open = 0 AND NOT e.dirty AND NOT e.deleted)::int) AS settled, '
        'sum(e.sign * (e.open = 0 AND NOT e.dirty AND NOT e.deleted AND e.content_hash IS DISTINCT FROM k.textless)::int) AS with_text, '
        'sum(e.sign * (e.open <> 0 OR e.dirty)::int) AS unsettled '
        'FROM (%s) e JOIN k ON k.id = e.target GROUP BY e.target) s '
        'WHERE s.settled <> 0 OR s.with_text <> 0 OR s.unsettled <> 0';
    came constant text := 'SELECT 1 AS sign, n.target, n.open, n.dirty, n.deleted, n.content_hash FROM new_rows n';
    went constant text := 'SELECT -1 AS sign, o.target, o.open, o.dirty, o.deleted, o.content_hash FROM old_rows o';
BEGIN
    EXECUTE format(head, 'insert') || format(sums, came) || tail;
    EXECUTE format(head, 'delete') || format(sums, went) || tail;
    EXECUTE format(head, 'update') || format(sums, came || ' UNION ALL ' || went) || tail;
    EXECUTE format(head, 'truncate')
        || 'SELECT d.target, -sum(d.settled), -sum(d.with_text), -sum(d.unsettled) FROM refarch.count_delta d GROUP BY d.target'
        || tail;
END $make$;

CREATE TRIGGER count_insert AFTER INSERT ON refarch.ledger REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION refarch.count_entries_insert();
CREATE TRIGGER count_update AFTER UPDATE ON refarch.ledger REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION refarch.count_entries_update();
CREATE TRIGGER count_delete AFTER DELETE ON refarch.ledger REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION refarch.count_entries_delete();
CREATE TRIGGER count_truncate AFTER TRUNCATE ON refarch.ledger
    FOR EACH STATEMENT EXECUTE FUNCTION refarch.count_entries_truncate();

-- Triggers on a table of vectors; the argument is the target. An update changes no count.
CREATE FUNCTION refarch.count_records() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    change bigint;
BEGIN
    IF TG_OP = 'INSERT' THEN
        SELECT count(*) INTO change FROM new_rows;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT -count(*) INTO change FROM old_rows;
    ELSE
        SELECT -sum(d.records) INTO change FROM refarch.count_delta d WHERE d.target = TG_ARGV[0]::integer;
    END IF;
    IF change <> 0 THEN
        INSERT INTO refarch.count_delta (target, records) VALUES (TG_ARGV[0]::integer, change);
    END IF;
    RETURN NULL;
END $$;

-- Begins to count the vectors of a target. Its table exists and has no such triggers.
CREATE FUNCTION refarch.begin_count(target integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text := format('refarch.vector_%s', begin_count.target);
BEGIN
    EXECUTE format(
        'CREATE TRIGGER count_insert AFTER INSERT ON %1$s REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT '
        'EXECUTE FUNCTION refarch.count_records(%2$s); '
        'CREATE TRIGGER count_delete AFTER DELETE ON %1$s REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT '
        'EXECUTE FUNCTION refarch.count_records(%2$s); '
        'CREATE TRIGGER count_truncate AFTER TRUNCATE ON %1$s FOR EACH STATEMENT EXECUTE FUNCTION refarch.count_records(%2$s); '
        'INSERT INTO refarch.count_delta (target, records) SELECT %2$s, count(*) FROM %1$s', name, begin_count.target);
END $$;

-- What is there already. The triggers hold a lock that keeps writers out until this is committed.
INSERT INTO refarch.count_delta (target, settled, with_text, unsettled)
SELECT l.target, count(*) FILTER (WHERE l.open = 0 AND NOT l.dirty AND NOT l.deleted),
       count(*) FILTER (WHERE l.open = 0 AND NOT l.dirty AND NOT l.deleted AND l.content_hash IS DISTINCT FROM k.textless),
       count(*) FILTER (WHERE l.open <> 0 OR l.dirty)
FROM refarch.ledger l
JOIN (SELECT t.id, refarch.textless_hash(t.salt) AS textless FROM refarch.target t OFFSET 0) k ON k.id = l.target
GROUP BY l.target;
SELECT refarch.begin_count(t.id) FROM refarch.target t WHERE to_regclass(format('refarch.vector_%s', t.id)) IS NOT NULL;
