-- Outliers: rows whose texts are unlike all others. Such a row is far from the centre of its list, and a question about it may
-- lead to other lists. A search whose best match is weak reads the outliers too. All of this is learnt from a sample of the vectors
-- after the lists are built.
ALTER TABLE refarch.search_index
    -- A vector is an outlier if its cosine similarity to each landmark is below this.
    ADD COLUMN outlier_below real,
    -- The best match of a search through the lists is weak if its cosine similarity is below this.
    ADD COLUMN weak_below real,
    -- Outliers at the last check. Null until each vector has been compared with the landmarks.
    ADD COLUMN outliers bigint;

-- Stored vectors at random. Most vectors resemble one of them.
CREATE TABLE refarch.landmark (
    target    integer REFERENCES refarch.search_index ON DELETE CASCADE,
    number    integer,
    embedding real[] NOT NULL,
    PRIMARY KEY (target, number)
);

-- Writes of vectors add to this table. A check of the lists removes rows that are gone, or are no outliers any more: a search
-- reads them too, which does no harm.
CREATE TABLE refarch.outlier (
    target integer REFERENCES refarch.search_index ON DELETE CASCADE,
    id     text,
    PRIMARY KEY (target, id)
);
