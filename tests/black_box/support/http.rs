//! HTTP/1.1 read and written by hand, so that tests send and see the exact bytes.

use std::io::{self, BufRead, Write as _};

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;

/// Request or response as it arrived: the head byte for byte, the body without its framing.
#[derive(Clone, Debug, Default)]
pub struct Message {
    pub head: String,
    pub body: Vec<u8>,
    /// Number of the upstream's connection over which a request arrived.
    pub connection: usize,
}

// === impl Message ===

impl Message {
    /// Reads up to the empty line. Returns `None` if the peer closed before the first byte.
    pub fn read_head(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if from.read_until(b'\n', &mut head)? == 0 {
                return if head.is_empty() {
                    Ok(None)
                } else {
                    Err(cut_off())
                };
            }
        }
        let head = String::from_utf8(head).map_err(io::Error::other)?;
        Ok(Some(Self {
            head,
            ..Self::default()
        }))
    }

    /// Reads the body that the head announces. Fails if it ends early.
    pub fn read_body(&mut self, from: &mut impl BufRead) -> io::Result<()> {
        if self.header("transfer-encoding").is_some() {
            while let Some(chunk) = read_chunk(from)? {
                self.body.extend(chunk);
            }
        } else if let Some(length) = self.header("content-length") {
            self.body = vec![0; length.parse().map_err(io::Error::other)?];
            from.read_exact(&mut self.body)?;
        } else if self.head.starts_with("HTTP/") && ![204, 304].contains(&self.status()) {
            from.read_to_end(&mut self.body)?;
        }
        Ok(())
    }

    pub fn first_line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }

    pub fn method(&self) -> &str {
        self.first_line().split(' ').next().unwrap_or_default()
    }

    pub fn target(&self) -> &str {
        self.first_line().split(' ').nth(1).unwrap_or_default()
    }

    pub fn status(&self) -> u16 {
        self.target().parse().unwrap_or_default()
    }

    /// Returns names in lower case with their values, sorted.
    pub fn headers(&self) -> Vec<(String, &str)> {
        let (_, lines) = self.head.split_once("\r\n").unwrap_or_default();
        parse_headers(lines)
    }

    pub fn values(&self, wanted: &str) -> Vec<&str> {
        let headers = self.headers().into_iter();
        headers
            .filter(|(name, _)| name == wanted)
            .map(|(_, value)| value)
            .collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.values(name).first().copied()
    }

    /// Returns the values of several headers at once.
    pub fn told<const N: usize>(&self, names: [&str; N]) -> [Option<&str>; N] {
        names.map(|name| self.header(name))
    }

    pub fn text(&self) -> &str {
        str::from_utf8(&self.body).expect("a text body")
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}{}", self.head, self.body.escape_ascii()))
    }

    /// Returns several members of the body's `error`.
    #[track_caller]
    pub fn error<const N: usize>(&self, names: [&str; N]) -> [Value; N] {
        let mut body = self.json();
        names.map(|name| body["error"][name].take())
    }

    /// Returns status and service code, by which tests recognise a refusal.
    #[track_caller]
    pub fn refusal(&self) -> (u16, u64) {
        (
            self.status(),
            self.json()["code"].as_u64().unwrap_or_default(),
        )
    }
}

/// Parses lines such as `Name: value`. Returns names in lower case with their values, sorted.
pub fn parse_headers(lines: &str) -> Vec<(String, &str)> {
    let headers = lines.lines().filter_map(|line| line.split_once(':'));
    let mut headers: Vec<_> = headers
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    headers.sort();
    headers
}

/// Returns a request with our usual `Host`, these header lines and, if there is a body, its length.
pub fn request(line: &str, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = (!body.is_empty()).then_some(body.len());
    message(
        &format!("{line} HTTP/1.1\nhost: localhost"),
        headers,
        length,
        body,
    )
}

pub fn get(path: &str) -> Vec<u8> {
    request(&format!("GET {path}"), "", "")
}

pub fn post(path: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    request(
        &format!("POST {path}"),
        "content-type: application/json",
        body,
    )
}

/// Returns a response with these header lines and its length.
pub fn reply(status: u16, headers: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    message(
        &format!("HTTP/1.1 {status} Status"),
        headers,
        Some(body.len()),
        body,
    )
}

/// Returns a response in Kling's form.
pub fn kling(status: u16, body: impl AsRef<[u8]>) -> Vec<u8> {
    reply(status, "content-type: application/json", body)
}

fn message(start: &str, headers: &str, length: Option<usize>, body: &[u8]) -> Vec<u8> {
    let length = length.map(|length| format!("content-length: {length}\n"));
    let head = format!("{start}\n{headers}\n{}", length.unwrap_or_default());
    let lines = head.lines().filter(|line| !line.is_empty());
    let head: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    [head.as_bytes(), b"\r\n", body].concat()
}

pub fn gzip(body: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body.as_ref()).unwrap();
    encoder.finish().unwrap()
}

/// Reads one chunk of a chunked body. Returns `None` for the last chunk.
pub fn read_chunk(from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut size = String::new();
    from.read_line(&mut size)?;
    let size = usize::from_str_radix(size.trim_end(), 16).map_err(|_| cut_off())?;
    let mut chunk = vec![0; size + 2];
    from.read_exact(&mut chunk)?;
    let end = chunk.split_off(size);
    if end == b"\r\n" {
        Ok((size > 0).then_some(chunk))
    } else {
        Err(cut_off())
    }
}

/// Returns true if a response ended before it was whole.
pub fn is_cut_off(answer: &io::Result<Message>) -> bool {
    use io::ErrorKind::{ConnectionReset, UnexpectedEof};
    let kind = answer.as_ref().err().map(io::Error::kind);
    kind.is_some_and(|kind| [ConnectionReset, UnexpectedEof].contains(&kind))
}

/// Returns an error's `retryable`, or `None` if the error is not in the documented form.
pub fn documented(answer: &Message) -> Option<bool> {
    let body: Value = serde_json::from_slice(&answer.body).ok()?;
    let error = &body["error"];
    let texts = ["type", "definition", "explanation", "solution"];
    let retryable = error["retryable"].as_bool()?;
    let waits = retryable && [429, 503].contains(&answer.status());
    let whole = body["code"].is_i64()
        && body["message"].is_string()
        && body["request_id"].is_string()
        && texts.iter().all(|text| error[text].is_string())
        && error["type"].as_str() == answer.header("kling-proxy-error")
        && ["upstream", "proxy"].contains(&error["source"].as_str()?)
        && (error["upstream_status"].is_u64() || error["upstream_status"].is_null())
        && error["attempts"].is_u64()
        && answer.header("x-should-retry") == Some(if retryable { "true" } else { "false" })
        && (!waits || answer.header("retry-after").is_some());
    whole.then_some(retryable)
}

fn cut_off() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}
