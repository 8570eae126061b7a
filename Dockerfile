# The image of chat-memory: one binary on a base without a shell.
#
#   docker build --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" -t chat-memory .
#
# scripts/test-image builds it and tries it out.

ARG RUST_IMAGE=rust:1.95-slim-bookworm
# glibc, libgcc and CA certificates (for rediss:// and the models' HTTPS), and nothing that could be
# started besides our binary. Another base needs those three; its glibc must be as new as the one of
# RUST_IMAGE.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

# The crates we depend on, compiled. This layer lasts until Cargo.toml, Cargo.lock, .cargo or PROFILE
# changes: the package is built here without its sources.
FROM ${RUST_IMAGE} AS dependencies
ARG PROFILE=release
WORKDIR /build
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
# Cargo looks for the files of benches, tests and examples that the manifest names; they are not in
# the build context, so their sections go.
RUN awk '/^\[/ { skip = /^\[\[(bench|test|example)\]\]/ } !skip' Cargo.toml > Cargo.toml.new \
    && mv Cargo.toml.new Cargo.toml \
    && mkdir src \
    && echo 'fn main() {}' | tee build.rs > src/main.rs \
    && touch src/lib.rs \
    && cargo build --locked --profile "$PROFILE" --lib

FROM dependencies AS build
# Again: not every builder hands arguments on from stage to stage.
ARG PROFILE=release
# The commit for --version: the context has no git history. Without it, --version says "unknown".
ARG COMMIT=""
COPY build.rs ./
COPY proto proto
COPY src src
# Cargo compares times, and a checkout may be older than the stand-ins above. `dev` is the one
# profile whose folder has another name.
RUN find build.rs proto src -type f -exec touch {} + \
    && CHAT_MEMORY_BUILD_COMMIT="$COMMIT" \
        cargo build --locked --offline --profile "$PROFILE" --bin chat-memory \
    && profile_dir="$PROFILE" \
    && if [ "$PROFILE" = dev ]; then profile_dir=debug; fi \
    && install -D "target/$profile_dir/chat-memory" /out/chat-memory \
    && mkdir /out/data

FROM ${RUNTIME_IMAGE}
COPY --from=build /out/chat-memory /usr/local/bin/chat-memory
# The base has no shell to change an owner with.
COPY --from=build --chown=65532:65532 /out/data /data

# A number, so that Kubernetes can see that it is not root (runAsNonRoot). It is `nonroot` in
# RUNTIME_IMAGE.
USER 65532:65532

# The embedded store's file is chat-memory.db in the working directory. CHAT_MEMORY_DATABASE is not
# set here: the server takes one store, and whoever gives it --redis would have given it two.
WORKDIR /data
VOLUME /data

# Nothing is said about --listen: the default is 127.0.0.1:50051, which only containers in the same
# network namespace reach (a sidecar's neighbours). There is no authentication yet, so publishing a
# port has to be asked for: --listen 0.0.0.0:50051 --insecure
EXPOSE 50051

# Asks 127.0.0.1:50051. If the server listens elsewhere, CHAT_MEMORY_TARGET says where.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s --retries=3 CMD ["chat-memory", "health"]

# Drains for 20 s at most (--drain-seconds); docker waits for 10 s unless --stop-timeout says more.
STOPSIGNAL SIGTERM
ENTRYPOINT ["chat-memory"]

# Last: the commit changes with each build.
ARG COMMIT=""
LABEL org.opencontainers.image.title="chat-memory" \
      org.opencontainers.image.description="A gRPC memory server for LLM chats, on Redis or one embedded file" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
