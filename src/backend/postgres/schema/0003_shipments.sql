-- Messages that have left the outbox for a queue outside of this database, until that has taken them:
-- no transaction stays open during a call to it. What stands past its time (its relay died) is sent
-- by another, perhaps again. bodies: the messages, packed as they travel.
CREATE TABLE refarch.shipment (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source        text NOT NULL,
    bodies        text[] NOT NULL,
    changes       bigint NOT NULL,
    oldest        timestamptz NOT NULL,
    claimed_until timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
-- Written once, read hardly ever, and gone within a second: not worth compressing.
ALTER TABLE refarch.shipment ALTER bodies SET STORAGE EXTERNAL;

-- How many changes a message of late held, for queues that count messages only. The sums are halved
-- now and then, so that old messages weigh less.
CREATE TABLE refarch.packing (
    source   text NOT NULL,
    lane     text NOT NULL,
    messages bigint NOT NULL,
    changes  bigint NOT NULL,
    PRIMARY KEY (source, lane)
) WITH (fillfactor = 10);

-- Nobody ever leased rows of the outbox themselves.
ALTER TABLE refarch.outbox DROP COLUMN claimed_until;
