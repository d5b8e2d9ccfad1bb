# refarch with its model and a private PostgreSQL. Usage: README, "In a container".
#
#   docker build -t refarch .
#   docker run -p 127.0.0.1:3000:3000 refarch
#
# Both base images can be replaced by images of the same distribution. The builder needs cargo. The runtime
# needs only a C library that is no older than the builder's.
ARG RUST_IMAGE=rust:1.95-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS tools
# A C compiler for linking and for aws-lc; pip for scripts/setup. The base image's distribution decides the
# versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build

# PostgreSQL with pgvector, and the model. This stage changes only when the scripts change.
FROM tools AS parts
COPY Cargo.toml ./
COPY scripts/setup scripts/fetch_runtime.py scripts/
RUN REFARCH_RUNTIME_DIR=/refarch scripts/setup

FROM tools AS builder
# Compile the dependencies first, with empty sources, so that an edit to a source does not compile them again.
COPY Cargo.toml Cargo.lock ./
COPY src/encoder/Cargo.toml src/encoder/
COPY benches/encoder/Cargo.toml benches/encoder/
COPY benches/search/Cargo.toml benches/search/
RUN mkdir -p benches/encoder/src benches/search/src \
    && touch src/lib.rs src/encoder/lib.rs \
    && for file in src/main.rs benches/queue.rs benches/encoder/src/main.rs benches/search/src/main.rs; do echo 'fn main() {}' >"$file"; done \
    && cargo build --release --locked
COPY config config
COPY src src
# Cargo compares file times, and the times of a checkout may be older than the build above.
RUN touch src/lib.rs src/main.rs src/encoder/lib.rs \
    && cargo build --release --locked

FROM ${RUNTIME_IMAGE}
# Certificates for TLS, zlib for PostgreSQL. tini is process 1: it reaps PostgreSQL's processes whose parent
# has ended, and forwards signals.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates tini zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 refarch \
    && useradd --uid 10001 --gid refarch --no-create-home --home-dir /refarch --shell /usr/sbin/nologin refarch \
    && install -d -o refarch -g refarch -m 0755 /refarch \
    && install -d -o refarch -g refarch -m 0700 /refarch/postgres
COPY --from=parts /refarch/runtime /refarch/runtime
COPY --from=builder /build/target/release/refarch /usr/local/bin/refarch

# serve.bind is not loopback here: edits need REFARCH_SERVE_EDIT_TOKEN.
ENV REFARCH_RUNTIME_DIR=/refarch \
    REFARCH_SERVE_BIND=0.0.0.0:3000
USER refarch
WORKDIR /refarch
# The private PostgreSQL's data. A role with a DATABASE_URL does not use it.
VOLUME ["/refarch/postgres"]
EXPOSE 3000
STOPSIGNAL SIGTERM
# Only up and serve answer /healthz. Other roles count as healthy.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 CMD ["/bin/bash", "-c", "\
    [[ \" $(tr '\\0' ' ' </proc/1/cmdline) \" =~ ' '(up|serve)' ' ]] || exit 0; \
    exec 3<>/dev/tcp/127.0.0.1/3000 || exit 1; \
    printf 'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
    read -r -t 5 line <&3 && [[ $line == *' 200 '* ]]"]
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/refarch"]
CMD ["up"]
