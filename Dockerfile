# refarch with its model and a private PostgreSQL. The role is the argument. Usage: README, "In a container".
#
#   docker build -t refarch .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:3000:3000 refarch           # every role, private PostgreSQL
#   docker run --read-only --tmpfs /tmp -e DATABASE_URL=... refarch embed        # one role
#
# It builds for the machine's own architecture, x86-64 or arm64. Both base images can be replaced by images of the
# same distribution. The builder needs cargo. The runtime needs only a C library that is no older than the builder's.
# With BINARY=prebuilt the image takes dist/refarch, a binary that scripts/release made, and compiles nothing.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim
ARG BINARY=builder

FROM ${RUST_IMAGE} AS tools
# A C compiler for linking and for aws-lc; pip for scripts/setup. The base image's distribution decides the
# versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build

# PostgreSQL with pgvector, and the model, by pinned hash. This stage changes only when the pins change.
FROM tools AS parts
COPY Cargo.toml ./
COPY config/runtime.json config/
COPY scripts/setup scripts/fetch_runtime.py scripts/
RUN REFARCH_RUNTIME_DIR=/refarch scripts/setup && rm /refarch/runtime/.lock

FROM tools AS builder
ENV CARGO_PROFILE_RELEASE_STRIP=symbols
# Compile the dependencies first, with empty sources, so that an edit to a source does not compile them again.
COPY Cargo.toml Cargo.lock ./
COPY src/encoder/Cargo.toml src/encoder/
COPY benches/encoder/Cargo.toml benches/encoder/
COPY benches/search/Cargo.toml benches/search/
RUN mkdir -p benches/encoder/src benches/search/src \
    && touch src/lib.rs src/encoder/lib.rs \
    && for file in src/main.rs benches/queue.rs benches/encoder/src/main.rs benches/search/src/main.rs; do echo 'fn main() {}' >"$file"; done \
    && cargo build --release --locked
COPY config/default.toml config/prices.toml config/runtime.json config/
COPY src src
# Cargo compares file times, and the times of a checkout may be older than the build above.
RUN touch src/lib.rs src/main.rs src/encoder/lib.rs \
    && cargo build --release --locked \
    && install -D target/release/refarch /out/refarch

FROM scratch AS prebuilt
COPY dist/refarch /out/refarch

# hadolint ignore=DL3006
FROM ${BINARY} AS binary

FROM ${RUNTIME_IMAGE}
# Certificates for TLS, zlib for PostgreSQL. tini is process 1: it reaps PostgreSQL's processes whose parent
# has ended, and forwards signals.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates tini zlib1g \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log \
    && groupadd --gid 10001 refarch \
    && useradd --uid 10001 --gid refarch --no-create-home --home-dir /refarch --shell /usr/sbin/nologin refarch \
    && install -d -o refarch -g refarch -m 0755 /refarch \
    && install -d -o refarch -g refarch -m 0700 /refarch/postgres
COPY --from=parts /refarch/runtime /refarch/runtime
COPY --from=binary /out/refarch /usr/local/bin/refarch
# The database roles, for psql -f.
COPY config/roles.sql /etc/refarch/roles.sql
RUN chmod 0644 /etc/refarch/roles.sql

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="refarch" \
      org.opencontainers.image.description="Keeps a semantic search index in step with a PostgreSQL table" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Neither address is loopback here: edits need REFARCH_SERVE_EDIT_TOKEN, and metrics belong into a private network.
ENV REFARCH_RUNTIME_DIR=/refarch \
    REFARCH_SERVE_BIND=0.0.0.0:3000 \
    REFARCH_ADMIN_LISTEN=0.0.0.0:9464
# By number, so that a platform can see that it is not root.
USER 10001:10001
WORKDIR /refarch
# The private PostgreSQL's data. A role with a DATABASE_URL does not use it.
VOLUME ["/refarch/postgres"]
EXPOSE 3000 9464
STOPSIGNAL SIGTERM
# Every role that runs for long has the admin endpoint.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["refarch", "health"]
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/refarch"]
CMD ["up"]
