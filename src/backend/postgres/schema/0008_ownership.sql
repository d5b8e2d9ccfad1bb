-- Which place a target is, and which server the database was on when the last mark was made.

-- Where the records of a target are, for an index outside of this database: name (empty if the index is given by
-- its host), host and namespace. host is null until a migration has recorded the place.
ALTER TABLE refarch.target ADD COLUMN host text;

-- incarnation: see refarch.incarnation. foreign_note: the newest note of another name that was dealt with, which a
-- slow index may show again. changed_at: when the name was changed. taken_at: when an index of another database was
-- taken over.
ALTER TABLE refarch.lineage
    ADD COLUMN incarnation  text,
    ADD COLUMN foreign_note text,
    ADD COLUMN changed_at   timestamptz,
    ADD COLUMN taken_at     timestamptz;

-- The server and its timeline, as 'system identifier/timeline'. Another server has another identifier (a dump that
-- was restored, an upgrade); a replica that was promoted and a restore to a point in time have another timeline. A
-- part that this role or this service does not let us read is empty.
CREATE FUNCTION refarch.incarnation() RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    system text := '';
    timeline text := '';
BEGIN
    BEGIN
        SELECT c.system_identifier::text INTO system FROM pg_catalog.pg_control_system() c;
    EXCEPTION WHEN OTHERS THEN
        system := '';
    END;
    BEGIN
        -- Not from pg_control_checkpoint, which tells of the last checkpoint.
        timeline := left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8);
    EXCEPTION WHEN OTHERS THEN
        timeline := '';
    END;
    RETURN coalesce(system, '') || '/' || coalesce(timeline, '');
END $$;

-- Asks for every row of the source, and every id that the ledger knows: the relay puts them into the outbox. Entries stay as they are, so
-- that what agrees costs a look and no write. What was proved was proved of another state: a round begins at once,
-- which also finds records in the index that this database never knew.
CREATE FUNCTION refarch.queue_all(wanted integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    named text;
BEGIN
    SELECT t.source INTO STRICT named FROM refarch.target t WHERE t.id = wanted;
    PERFORM refarch.request_backfill(named, false, true);
    IF pg_catalog.to_regclass('refarch.proof_round') IS NOT NULL THEN
        EXECUTE 'UPDATE refarch.proof SET round = NULL WHERE target = $1' USING wanted;
        EXECUTE 'DELETE FROM refarch.proof_round WHERE target = $1' USING wanted;
    END IF;
END $$;

-- Marks every entry of a target as not to be trusted and queues everything; returns the number of entries. With
-- keep_hashes an entry keeps the content hash that it had: a record that carries the same hash carries its vector,
-- which is then sent again without being made again.
CREATE FUNCTION refarch.distrust(wanted integer, keep_hashes boolean) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    entries bigint;
BEGIN
    -- In id order, as every other writer of the ledger locks it.
    PERFORM 1 FROM refarch.ledger l WHERE l.target = wanted ORDER BY l.id COLLATE "C" FOR UPDATE;
    UPDATE refarch.ledger l SET epoch = l.epoch + 1, dirty = true, metadata_hash = NULL,
           content_hash = CASE WHEN keep_hashes AND NOT l.deleted THEN l.content_hash END,
           deleted = false, parked = false WHERE l.target = wanted;
    GET DIAGNOSTICS entries = ROW_COUNT;
    PERFORM refarch.queue_all(wanted);
    RETURN entries;
END $$;

-- Keys of ours in Pinecone's metadata had the names of these columns, and overwrote them.
DO $$
DECLARE
    broken integer;
BEGIN
    FOR broken IN
        SELECT t.id FROM refarch.target t JOIN refarch.source s ON s.name = t.source
        WHERE t.kind = 'pinecone' AND s.metadata_columns && ARRAY['version', 'content_hash', 'metadata_hash']
        ORDER BY t.id
    LOOP
        PERFORM refarch.distrust(broken, true);
    END LOOP;
END $$;
