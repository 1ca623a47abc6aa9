//! Whole requests that the program makes for itself: those of `check`, `health`, `wait` and `tasks`. They go by
//! reqwest. Requests of clients never do, since it rewrites paths.

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use reqwest::redirect::Policy;
use reqwest::{Client, Proxy, retry};
use rustls::RootCertStore;

use crate::request::headers::NAME;
use crate::upstream::{EgressProxy, TlsError, client_config_with};

/// Largest part of a body that [`fetch`] reads, in bytes.
const BODY_LIMIT: usize = 64 << 10;

/// A response with the beginning of its body.
pub(super) struct Fetched {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// True if the whole body was read.
    pub(super) is_whole: bool,
}

/// A client cannot be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot set up an HTTP client")]
    Http(#[from] reqwest::Error),
}

/// Makes a client that trusts `roots` and connects through `egress`, if there is one.
///
/// It ignores proxy variables, follows no redirect, and sends each request at most once.
pub(super) fn client(
    roots: Arc<RootCertStore>,
    egress: Option<&EgressProxy>,
) -> Result<Client, ClientError> {
    let mut client = Client::builder()
        .tls_backend_preconfigured(client_config_with(roots)?)
        .no_proxy()
        .redirect(Policy::none())
        .retry(retry::never())
        .http1_only()
        .user_agent(NAME);
    if let Some(egress) = egress {
        let mut proxy = Proxy::all(egress.url())?;
        if let Some(authorization) = egress.authorization() {
            proxy = proxy.custom_http_auth(authorization.clone());
        }
        client = client.proxy(proxy);
    }
    Ok(client.build()?)
}

/// Makes a client for plain HTTP on this machine. It trusts no TLS server.
pub(super) fn plain() -> Result<Client, ClientError> {
    client(RootCertStore::empty().into(), None)
}

/// Sends a GET and reads the beginning of the response.
///
/// # Errors
///
/// The request could not be sent, or the response broke off.
pub(super) async fn fetch(
    client: &Client,
    url: impl fmt::Display,
    headers: HeaderMap,
) -> Result<Fetched, reqwest::Error> {
    fetch_up_to(BODY_LIMIT, client, url, headers).await
}

/// Does the same with another limit for the body, in bytes.
///
/// # Errors
///
/// As of [`fetch`].
pub(super) async fn fetch_up_to(
    limit: usize,
    client: &Client,
    url: impl fmt::Display,
    headers: HeaderMap,
) -> Result<Fetched, reqwest::Error> {
    let request = client.get(url.to_string()).headers(headers);
    let mut response = request.send().await?;
    let (mut body, mut is_whole) = (Vec::new(), false);
    while body.len() < limit && !is_whole {
        match response.chunk().await? {
            Some(chunk) => body.extend_from_slice(&chunk),
            None => is_whole = true,
        }
    }
    Ok(Fetched {
        status: response.status(),
        headers: response.headers().clone(),
        body,
        is_whole,
    })
}
