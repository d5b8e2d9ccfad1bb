-- What refarch made outside of its own schema, so that uninstalling takes away that and no more.
CREATE TABLE refarch.made (
    what text NOT NULL,
    name text NOT NULL,
    at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (what, name)
);
