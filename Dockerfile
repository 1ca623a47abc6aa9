# The tag is `rust-version` in Cargo.toml; bookworm, for the same glibc as in the other.
ARG BUILD_IMAGE=docker.io/library/rust:1.95-bookworm
# glibc and libgcc for the binary, NSS for name resolution, CA certificates for TLS; no shell, no package manager.
ARG BASE_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /build

# Dependencies alone, against empty sources: a layer that lasts until the lock file changes.
COPY Cargo.toml Cargo.lock ./
COPY .cargo/config.toml .cargo/config.toml
RUN mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked \
    && rm -r src

# Then the proxy. `touch`: Cargo goes by file times, and a checkout may be older than the empty sources.
COPY config/default.toml config/default.toml
COPY src src
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked

FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="kling-proxy" \
      org.opencontainers.image.description="A local authenticating reverse proxy for the Kling AI API" \
      org.opencontainers.image.licenses="MIT"

COPY --from=build /build/target/release/kling-proxy /usr/local/bin/kling-proxy

# By number, so that Kubernetes' `runAsNonRoot` can judge it.
USER 65532:65532

# Both listeners stay on loopback unless the settings say otherwise. That is right for a sidecar, which shares its
# pod's loopback; config/compose.yaml shows the proxy as a service of its own, which needs client tokens.
EXPOSE 5546 5547

# Docker's check; Kubernetes ignores it, and config/kubernetes/ has probes instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/kling-proxy", "health"]

ENTRYPOINT ["/usr/local/bin/kling-proxy"]
