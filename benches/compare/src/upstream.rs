//! Stand-in for Kling's API: https on a free port of 127.0.0.1, HTTP/1.1 or HTTP/2 by ALPN, with fixed
//! responses.
//!
//! It is strict, so that no proxy is fast because it leaves something out: it refuses a request without a
//! valid token or for another host. It writes its trust root to a file, then prints its port.

use std::{
    convert::Infallible,
    error::Error,
    fs,
    io::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use clap::Parser;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue},
    http::request::Parts,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use ring::hmac::{self, HMAC_SHA256};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// Finished task, as in the response to a poll: 600 bytes.
const TASK: &str = concat!(
    r#"{"code":0,"message":"SUCCEED","request_id":"CmYbBGdv6pUAAAAAAB4Xgg","data":{"task_id":"104454366743201459","#,
    r#""task_status":"succeed","task_status_msg":"","task_info":{"external_task_id":"bench-0001"},"#,
    r#""created_at":1722769557708,"updated_at":1722769559708,"task_result":{"videos":[{"#,
    r#""id":"f2b1a6c2-1b1f-4d9e-9b0a-5b8f6f3f6b1e","url":"https://video.invalid/bs2/upload-ylab-stunt-sgp/se/"#,
    r#"stream_lake_m2v_image2video_v26_std/f2b1a6c2-1b1f-4d9e-9b0a-5b8f6f3f6b1e_raw_video.mp4?x-kcdn-pid=112757&"#,
    r#"signature=AbCdEfGhIjKlMnOpQrStUvWxYz0123456789AbCdEfGhIjKlMnOp","duration":"5.1"}]},"final_unit_deduction":"0.35"}}"#,
);
/// Task that has just been created.
const CREATED: &str = concat!(
    r#"{"code":0,"message":"SUCCEED","request_id":"CmYbBGdv6pUAAAAAAB4Xgg","data":{"task_id":"104454366743201459","#,
    r#""task_status":"submitted","created_at":1722769557708,"updated_at":1722769557708}}"#,
);
const LIMITED: &str = r#"{"code":1303,"message":"parallel task over resource pack limit","request_id":"CmYbBGdv6pUAAAAAAB4Xgg"}"#;
const NO_TOKEN: &str = r#"{"code":1002,"message":"access key not found or token not valid","request_id":"CmYbBGdv6pUAAAAAAB4Xgg"}"#;
const WRONG_HOST: &str =
    r#"{"code":1200,"message":"wrong host","request_id":"CmYbBGdv6pUAAAAAAB4Xgg"}"#;

#[derive(Parser)]
struct Arguments {
    /// File to write the trust root to.
    #[arg(long)]
    ca_file: PathBuf,
    /// Access key of the only credential that is accepted.
    #[arg(long)]
    access_key: String,
    #[arg(long)]
    secret_key: String,
}

/// Host and credential that requests must have.
struct Upstream {
    host: String,
    access_key: String,
    key: hmac::Key,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let (tls, root) = certified()?;
    fs::write(arguments.ca_file, root)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let upstream = Arc::new(Upstream {
        host: format!("localhost:{port}"),
        access_key: arguments.access_key,
        key: hmac::Key::new(HMAC_SHA256, arguments.secret_key.as_bytes()),
    });
    writeln!(io::stdout(), "{port}")?;
    serve(listener, tls, upstream).await?;
    Ok(())
}

/// Returns TLS for `localhost`, and the PEM of the root that signs its certificate.
fn certified() -> Result<(TlsAcceptor, String), Box<dyn Error>> {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a certificate for self-signed if its subject and issuer are the same name.
    root.distinguished_name
        .push(DnType::CommonName, "Root of the comparison");
    let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(["localhost".to_owned()])?.signed_by(&key, &root)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        )?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(tls)), root.pem()))
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, upstream: Arc<Upstream>) -> io::Result<()> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    // With these windows, no upload of the loads has to wait.
    http.http2()
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (tls, http, upstream) = (tls.clone(), http.clone(), Arc::clone(&upstream));
        tokio::spawn(async move {
            let service = service_fn(move |request| Arc::clone(&upstream).answer(request));
            if let Ok(stream) = tls.accept(tcp).await {
                // The client notices a broken connection itself.
                let _ = http.serve_connection(TokioIo::new(stream), service).await;
            }
        });
    }
}

// === impl Upstream ===

impl Upstream {
    /// Reads the body to its end, then responds.
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let (head, mut body) = request.into_parts();
        while let Some(Ok(_)) = body.frame().await {}
        let (status, body) = self.judge(&head);
        let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
        *response.status_mut() = status;
        let json = HeaderValue::from_static("application/json; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, json);
        Ok(response)
    }

    fn judge(&self, head: &Parts) -> (StatusCode, &'static str) {
        let authorization = head.headers.get(AUTHORIZATION);
        if authorization.and_then(|value| self.verify(value)) != Some(true) {
            return (StatusCode::UNAUTHORIZED, NO_TOKEN);
        }
        // HTTP/2 has the host in the target, HTTP/1.1 in a header.
        let authority = head.uri.authority().map(|it| it.as_str().as_bytes());
        let host = authority.or_else(|| head.headers.get(HOST).map(HeaderValue::as_bytes));
        if host != Some(self.host.as_bytes()) {
            return (StatusCode::MISDIRECTED_REQUEST, WRONG_HOST);
        }
        match (head.method.as_str(), head.uri.path()) {
            (_, "/limited") => (StatusCode::TOO_MANY_REQUESTS, LIMITED),
            ("GET", _) => (StatusCode::OK, TASK),
            _ => (StatusCode::OK, CREATED),
        }
    }

    /// Returns true if a token is valid now. Returns `None` if it cannot be read, or is not signed with the
    /// secret key.
    fn verify(&self, authorization: &HeaderValue) -> Option<bool> {
        let token = authorization.to_str().ok()?.strip_prefix("Bearer ")?;
        let (signed, signature) = token.rsplit_once('.')?;
        let signature = BASE64.decode(signature).ok()?;
        hmac::verify(&self.key, signed.as_bytes(), &signature).ok()?;
        let (header, claims) = signed.split_once('.')?;
        let (header, claims) = (decode(header)?, decode(claims)?);
        let now = SystemTime::UNIX_EPOCH.elapsed().ok()?.as_secs();
        let valid = claims["nbf"].as_u64()? <= now && now < claims["exp"].as_u64()?;
        Some(valid && header["alg"] == "HS256" && claims["iss"] == *self.access_key)
    }
}

fn decode(part: &str) -> Option<Value> {
    serde_json::from_slice(&BASE64.decode(part).ok()?).ok()
}
