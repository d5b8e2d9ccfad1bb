-- What each migration was when it was applied: the SHA-256 of its file. A build that was given another file under the
-- same version does not know what is there. Databases of earlier builds get theirs filled in.
ALTER TABLE refarch.migration ADD COLUMN checksum text;
