//! Tunnels through the HTTP proxy of a network (`upstream.proxy`).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::header::{HOST, PROXY_AUTHORIZATION, USER_AGENT};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;

use super::origin::{Origin, without_brackets};
use crate::error::BoxError;
use crate::request::headers::NAME;

/// An HTTP proxy that opens tunnels (`CONNECT`: RFC 9110, section 9.3.6).
///
/// The proxy learns the name and port of upstream and nothing else, because the tunnel carries TLS. An
/// upstream of plain http, which can only be on this machine, is therefore connected to directly.
#[derive(Clone)]
pub struct EgressProxy {
    authority: Authority,
    /// Credentials from `user:password@` in the URL, marked sensitive.
    authorization: Option<HeaderValue>,
}

/// Error for a text that is not the URL of an egress proxy. The text may hold a password, so the message
/// shows nothing of it.
#[derive(Debug, thiserror::Error)]
#[error("want a URL such as http://proxy.example:3128 or http://user:password@proxy.example:3128")]
pub struct NoEgressProxy;

/// Reasons why the egress proxy opened no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No connection to the egress proxy could be made.
    #[error("cannot connect to the egress proxy")]
    Unreachable(#[source] BoxError),
    /// The egress proxy refused, or cannot reach upstream. This is its status.
    #[error("the egress proxy answered {0}")]
    Refused(StatusCode),
    /// The server at the address is no HTTP proxy, or the connection broke.
    #[error("the egress proxy did not open a tunnel")]
    Failed(#[source] BoxError),
}

// === impl EgressProxy ===

impl EgressProxy {
    /// Returns this proxy if connections to `origin` go through it. An origin of plain http is on this
    /// machine itself, and needs no proxy.
    pub fn leading_to(self, origin: &Origin) -> Option<Self> {
        origin.is_secure().then_some(self)
    }

    /// Returns the name or address to connect to, without brackets, and the port.
    pub fn name_and_port(&self) -> (&str, u16) {
        let port = self.authority.port_u16().unwrap_or(80);
        (without_brackets(self.authority.host()), port)
    }

    /// The proxy's URL, without user and password.
    pub fn url(&self) -> String {
        format!("http://{}", self.authority)
    }

    /// The value of `Proxy-Authorization`, if the proxy needs one.
    pub fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// Asks for a tunnel on a connection to the proxy, and returns the stream, which then leads to `origin`.
    ///
    /// # Errors
    ///
    /// [`TunnelError`]. Nothing was sent to `origin`.
    pub async fn open_tunnel(
        &self,
        stream: TcpStream,
        origin: &Origin,
    ) -> Result<TcpStream, TunnelError> {
        let failed = |error: hyper::Error| TunnelError::Failed(error.into());
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(failed)?;
        tokio::spawn(connection.with_upgrades());
        let request = self.request(origin).map_err(TunnelError::Failed)?;
        let answer = sender.send_request(request).await.map_err(failed)?;
        if !answer.status().is_success() {
            return Err(TunnelError::Refused(answer.status()));
        }
        let tunnel = hyper::upgrade::on(answer).await.map_err(failed)?;
        match tunnel.downcast::<TokioIo<TcpStream>>() {
            // In TLS the client sends first, so nothing may follow the proxy's response.
            Ok(parts) if parts.read_buf.is_empty() => Ok(parts.io.into_inner()),
            _ => Err(TunnelError::Failed("it said more than its answer".into())),
        }
    }

    fn request(&self, origin: &Origin) -> Result<Request<Empty<Bytes>>, BoxError> {
        let (_, port) = origin.name_and_port();
        let authority = format!("{}:{port}", origin.bracketed_name());
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&authority)
            .header(HOST, &authority)
            .header(USER_AGENT, NAME)
            .body(Empty::new())?;
        if let Some(authorization) = &self.authorization {
            let headers = request.headers_mut();
            headers.insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }
}

impl FromStr for EgressProxy {
    type Err = NoEgressProxy;

    fn from_str(url: &str) -> Result<Self, NoEgressProxy> {
        let uri: Uri = url.parse().map_err(|_| NoEgressProxy)?;
        let path = uri.path_and_query().map_or("", |path| path.as_str());
        let authority = uri.authority().ok_or(NoEgressProxy)?.as_str();
        if uri.scheme() != Some(&Scheme::HTTP) || !matches!(path, "" | "/") || url.contains('#') {
            return Err(NoEgressProxy);
        }
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let authority: Authority = host.parse().map_err(|_| NoEgressProxy)?;
        if authority.host().is_empty() {
            return Err(NoEgressProxy);
        }
        Ok(Self {
            authority,
            authorization: user.map(basic).transpose()?,
        })
    }
}

impl fmt::Debug for EgressProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EgressProxy")
            .field("authority", &self.authority)
            .finish_non_exhaustive()
    }
}

/// Returns the status with which the egress proxy refused, if it would refuse again. Each further attempt may
/// count against a user whose password is wrong.
pub(super) fn final_status(error: &BoxError) -> Option<StatusCode> {
    match error.downcast_ref()? {
        &TunnelError::Refused(
            status @ (StatusCode::FORBIDDEN
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::PROXY_AUTHENTICATION_REQUIRED),
        ) => Some(status),
        _ => None,
    }
}

/// Builds credentials of the Basic scheme (RFC 7617) from the part of a URL before `@`.
fn basic(user: &str) -> Result<HeaderValue, NoEgressProxy> {
    // If there is no password, an empty one is sent.
    let (user, password) = user.split_once(':').unwrap_or((user, ""));
    let mut credentials: Vec<u8> = percent_decode_str(user).collect();
    credentials.push(b':');
    credentials.extend(percent_decode_str(password));
    let value = format!("Basic {}", BASE64_STANDARD.encode(credentials));
    let mut value = HeaderValue::try_from(value).map_err(|_| NoEgressProxy)?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_egress_proxy_is_an_http_url_with_or_without_a_user() {
        for (url, expected) in [
            ("http://proxy.test:3128", Some(("proxy.test", 3128, None))),
            ("http://proxy.test/", Some(("proxy.test", 80, None))),
            ("http://[::1]:8080", Some(("::1", 8080, None))),
            (
                "http://user:pass@proxy.test:1",
                Some(("proxy.test", 1, Some("user:pass"))),
            ),
            (
                "http://a%40b:%3a%2F@proxy.test:1",
                Some(("proxy.test", 1, Some("a@b::/"))),
            ),
            (
                "http://user@proxy.test",
                Some(("proxy.test", 80, Some("user:"))),
            ),
            ("https://proxy.test:3128", None),
            ("socks5://proxy.test:1080", None),
            ("proxy.test:3128", None),
            ("http://proxy.test/path", None),
            ("http://proxy.test?query", None),
            ("http://proxy.test#fragment", None),
            ("http://user@", None),
            ("http://", None),
        ] {
            let parsed = url.parse::<EgressProxy>().ok();
            let actual = parsed.as_ref().map(|proxy| {
                let (name, port) = proxy.name_and_port();
                let credentials = proxy.authorization.as_ref().map(|value| {
                    let encoded = value.to_str().unwrap().strip_prefix("Basic ").unwrap();
                    String::from_utf8(BASE64_STANDARD.decode(encoded).unwrap()).unwrap()
                });
                (name, port, credentials)
            });
            let expected = expected
                .map(|(name, port, credentials)| (name, port, credentials.map(str::to_owned)));
            assert_eq!(actual, expected, "{url}");
        }
    }

    #[test]
    fn debug_shows_nothing_of_the_password() {
        let proxy: EgressProxy = "http://user:canary@proxy.test:3128".parse().unwrap();
        let shown = format!("{proxy:?}");
        assert_eq!(shown, "EgressProxy { authority: proxy.test:3128, .. }");
    }
}
