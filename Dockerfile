# The tag is `rust-version` in Cargo.toml; bookworm, for the same glibc as in the other.
ARG BUILD_IMAGE=docker.io/library/rust:1.95-bookworm
# glibc and libgcc for the binary, NSS for name resolution, CA certificates for TLS; no shell, no package manager.
ARG BASE_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
# Lists the crates in the bill of materials, where the builder makes one (`docker buildx build --sbom=true`).
ARG BUILDKIT_SBOM_SCAN_STAGE=true
WORKDIR /build

# Dependencies alone, against empty sources: a layer that lasts until the lock file changes. On arm64 some kernels have
# pages of 64 KiB; without this setting jemalloc would refuse to start on them.
COPY Cargo.toml Cargo.lock ./
COPY .cargo/config.toml .cargo/config.toml
RUN mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi \
    && cargo build --release --locked \
    && rm -r src

# Then the proxy. `touch`: Cargo goes by file times, and a checkout may be older than the empty sources.
COPY config/default.toml config/default.toml
COPY src src
RUN touch src/main.rs src/lib.rs \
    && if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi \
    && cargo build --release --locked
RUN mkdir /empty

FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="kling-proxy" \
      org.opencontainers.image.description="A local authenticating reverse proxy for the Kling AI API" \
      org.opencontainers.image.licenses="MIT"

COPY --from=build /build/target/release/kling-proxy /usr/local/bin/kling-proxy
# The folder of the task store. A new named volume takes its owner over. Without a volume, tasks are in memory where the
# root is read-only.
COPY --from=build --chown=65532:65532 /empty /var/lib/kling-proxy
ENV STATE_DIRECTORY=/var/lib/kling-proxy

# By number, so that Kubernetes' `runAsNonRoot` can judge it.
USER 65532:65532

# Both listeners stay on loopback unless the settings say otherwise. That is right for a sidecar, which shares its
# pod's loopback; config/compose.yaml shows the proxy as a service of its own, which needs client tokens.
EXPOSE 5546 5547

# Docker's check; Kubernetes ignores it, and config/kubernetes/ has probes instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/kling-proxy", "health"]

ENTRYPOINT ["/usr/local/bin/kling-proxy"]
