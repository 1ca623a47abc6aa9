//! Contestant made with Pingora: one upstream over TLS, its host, and a fixed token.
//!
//! The arguments are its port, the port of upstream, the trust root, and the token.

use std::{env, thread};

use async_trait::async_trait;
use pingora::{
    Result,
    http::RequestHeader,
    proxy::{ProxyHttp, Session, http_proxy_service},
    server::{Server, configuration::ServerConf},
    upstreams::peer::HttpPeer,
};

struct Proxy {
    upstream: String,
    host: String,
    authorization: String,
}

// === impl Proxy ===

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, (): &mut ()) -> Result<Box<HttpPeer>> {
        let name = "localhost".to_owned();
        Ok(Box::new(HttpPeer::new(self.upstream.as_str(), true, name)))
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        (): &mut (),
    ) -> Result<()> {
        request.insert_header("host", self.host.as_str())?;
        request.insert_header("authorization", self.authorization.as_str())
    }
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [port, upstream, ca_file, token] = &arguments[..] else {
        panic!("want PORT UPSTREAM_PORT CA_FILE TOKEN");
    };
    let configuration = ServerConf {
        threads: thread::available_parallelism().map_or(1, usize::from),
        ca_file: Some(ca_file.clone()),
        upstream_keepalive_pool_size: 1024,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, configuration);
    server.bootstrap();
    let proxy = Proxy {
        upstream: format!("127.0.0.1:{upstream}"),
        host: format!("localhost:{upstream}"),
        authorization: format!("Bearer {token}"),
    };
    let mut service = http_proxy_service(&server.configuration, proxy);
    service.add_tcp(&format!("127.0.0.1:{port}"));
    server.add_service(service);
    server.run_forever();
}
