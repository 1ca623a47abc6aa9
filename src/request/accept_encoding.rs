//! Restricts the `Accept-Encoding` of a request to encodings that the proxy can read. The proxy reads the
//! responses of upstream, because it looks for a service code in them.

use http::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};

/// Encodings that the proxy reads, as the upstream client decodes them. `x-gzip` is another name of `gzip`
/// (RFC 9110, section 8.4.1.3).
const READABLE: [&str; 3] = ["gzip", "deflate", "identity"];

const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

/// Removes from `Accept-Encoding` the encodings that the proxy cannot read. The rest stays unchanged.
///
/// - `*` stands for every encoding that the header does not name. Unless its weight is 0, it is replaced
///   by the encodings among them that the proxy can read.
/// - `identity` is sent if no acceptable encoding remains. Without the header, upstream might use any
///   encoding (RFC 9110, section 12.5.3).
/// - No header is added if the client sent none. Then too upstream might use any encoding, but servers use
///   none that the client did not ask for.
pub fn restrict(headers: &mut HeaderMap) {
    let lines = headers.get_all(ACCEPT_ENCODING);
    if lines.iter().all(is_readable) {
        return;
    }
    let mut unnamed = READABLE.to_vec();
    for named in lines.iter().flat_map(items).filter_map(readable) {
        unnamed.retain(|name| *name != named);
    }
    let mut restricted = Vec::new();
    for line in &lines {
        let mut kept = Vec::new();
        for item in items(line) {
            if is_harmless(item) {
                kept.push(item.to_vec());
            } else if let Some(weight) = item.strip_prefix(b"*").filter(|_| coding(item) == b"*") {
                // Only the first `*` is replaced: a line of many `*` must not grow.
                let unnamed = unnamed.drain(..);
                kept.extend(unnamed.map(|name| [name.as_bytes(), weight].concat()));
            }
        }
        restricted.extend(HeaderValue::from_bytes(&kept.join(&b", "[..])));
    }
    restricted.retain(|line| !line.is_empty());
    if restricted.iter().flat_map(items).all(is_refused) {
        restricted = vec![IDENTITY];
    }
    // The first line takes the place of the header, so that the other headers keep their order too.
    let mut restricted = restricted.into_iter();
    headers.insert(ACCEPT_ENCODING, restricted.next().unwrap_or(IDENTITY));
    for line in restricted {
        headers.append(ACCEPT_ENCODING, line);
    }
}

/// Returns true if a line allows no encoding that the proxy cannot read.
pub fn is_readable(line: &HeaderValue) -> bool {
    // Most programs send one of these two lines. To check each element would cost a few hundred instructions
    // per poll.
    matches!(line.as_bytes(), b"gzip, deflate" | b"gzip") || items(line).all(is_harmless)
}

/// Returns the elements of a line. Each is an encoding, and a weight may follow it.
fn items(line: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    let items = line.as_bytes().split(|b| *b == b',');
    items
        .map(<[u8]>::trim_ascii)
        .filter(|item| !item.is_empty())
}

/// Returns the encoding of an element, without the weight.
fn coding(item: &[u8]) -> &[u8] {
    let end = item.iter().position(|b| *b == b';');
    item[..end.unwrap_or(item.len())].trim_ascii()
}

/// Returns the name in [`READABLE`] of an element's encoding; `None` if the proxy cannot read the encoding.
fn readable(item: &[u8]) -> Option<&'static str> {
    let coding = coding(item);
    let coding = match coding.split_at_checked(2) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case(b"x-") && is(rest, "gzip") => rest,
        _ => coding,
    };
    READABLE.into_iter().find(|name| is(coding, name))
}

fn is(coding: &[u8], name: &str) -> bool {
    coding.eq_ignore_ascii_case(name.as_bytes())
}

/// Returns true if an element allows no encoding that the proxy cannot read.
fn is_harmless(item: &[u8]) -> bool {
    readable(item).is_some() || (coding(item) == b"*" && is_refused(item))
}

/// Returns true if an element has the weight 0, which means that the client does not accept it.
fn is_refused(item: &[u8]) -> bool {
    let mut parameters = item.split(|b| *b == b';').skip(1).map(<[u8]>::trim_ascii);
    parameters.any(|parameter| match parameter {
        [b'q' | b'Q', b'=', b'0', rest @ ..] => rest.iter().all(|b| matches!(b, b'.' | b'0')),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restricted(lines: &[&str]) -> Vec<String> {
        let lines = lines.iter().map(|line| line.parse().unwrap());
        let mut headers: HeaderMap = lines.map(|line| (ACCEPT_ENCODING, line)).collect();
        restrict(&mut headers);
        let lines = headers.get_all(ACCEPT_ENCODING).into_iter();
        lines
            .map(|line| line.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn what_the_proxy_can_read_stays_as_it_came() {
        for lines in [
            &[][..],
            &[""],
            &[","],
            &["gzip"],
            &["gzip, deflate"],
            &["GZip;q=1.0,,  x-gzip ; q=0.5, identity; q=0"],
            &["gzip, *;q=0", "deflate;q=0.000"],
        ] {
            assert_eq!(restricted(lines), lines, "{lines:?}");
        }
    }

    #[test]
    fn what_the_proxy_cannot_read_is_left_out() {
        for (lines, rest) in [
            (&["gzip, deflate, br"][..], &["gzip, deflate"][..]),
            (&["br;q=1.0,gzip ;q=0.8,*;q=0"], &["gzip ;q=0.8, *;q=0"]),
            (&["zstd", "gzip", "br, x-gzip"], &["gzip", "x-gzip"]),
            (&["BR, compress, dcb, gzipped, gzip2, x-gzip"], &["x-gzip"]),
            (&["br;q=0, gzip"], &["gzip"]),
        ] {
            assert_eq!(restricted(lines), rest, "{lines:?}");
        }
    }

    #[test]
    fn any_encoding_becomes_those_that_the_proxy_can_read() {
        for (lines, rest) in [
            (&["*"][..], &["gzip, deflate, identity"][..]),
            (
                &["* ;q=0.5"],
                &["gzip ;q=0.5, deflate ;q=0.5, identity ;q=0.5"],
            ),
            (
                &["br, *;q=0.1, X-Gzip"],
                &["deflate;q=0.1, identity;q=0.1, X-Gzip"],
            ),
            (&["*, *;q=0.5", "*"], &["gzip, deflate, identity"]),
            (&["*", "identity;q=0"], &["gzip, deflate", "identity;q=0"]),
            (
                &["*, gzip, deflate, identity"],
                &["gzip, deflate, identity"],
            ),
            (&["*;q="], &["gzip;q=, deflate;q=, identity;q="]),
        ] {
            assert_eq!(restricted(lines), rest, "{lines:?}");
        }
    }

    #[test]
    fn where_nothing_acceptable_remains_no_encoding_is_asked_for() {
        for lines in [
            &["br"][..],
            &["br", "zstd"],
            &["br, gzip;q=0"],
            &["br, identity;q=0"],
            &["br, *;q=0.0"],
        ] {
            assert_eq!(restricted(lines), ["identity"], "{lines:?}");
        }
    }
}
