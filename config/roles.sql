-- The database roles of the services, with the passwords that are in the environment. Run by the owner (scripts/deploy-aws,
-- compose, the Job in config/kubernetes) before refarch migrate --roles, which gives these roles their rights.
\set ON_ERROR_STOP on
\getenv serve SERVE_PASSWORD
\getenv listen LISTEN_PASSWORD
\getenv embed EMBED_PASSWORD
SELECT format('CREATE ROLE %I LOGIN', name)
FROM (VALUES ('refarch_serve'), ('refarch_listen'), ('refarch_embed')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec
-- Each time, so that a new password takes effect. psql shows no statement that \gexec runs.
SELECT format('ALTER ROLE %I PASSWORD %L', name, password)
FROM (VALUES ('refarch_serve', :'serve'), ('refarch_listen', :'listen'), ('refarch_embed', :'embed')) AS wanted (name, password)
\gexec
