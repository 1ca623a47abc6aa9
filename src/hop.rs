//! Ends a loop of proxies at its first turn. A proxy whose upstream is on this machine may be that
//! upstream's upstream, through others or at once, and a request would go round for ever.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::Error;
use crate::request_id::RequestId;
use crate::upstream::Origin;

/// A proxy that may be a part of a loop.
pub struct Hop {
    /// The name of this process, which no other has.
    id: HeaderValue,
}

/// Has the ids of the proxies that a request came through.
const HOP: HeaderName = HeaderName::from_static("kling-proxy-hop");

// === impl Hop ===

impl Hop {
    /// `None` if upstream is not on this machine: then others learn nothing of us.
    pub fn to(origin: &Origin) -> Option<Self> {
        origin.loopback_port().map(|_| Self {
            id: RequestId::random().into_value(),
        })
    }

    /// Refuses a request that came through here before.
    ///
    /// # Errors
    ///
    /// [`Error::BadRequest`].
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let mut ids = headers.get_all(HOP).iter().flat_map(|ids| {
            let ids = ids.as_bytes().split(|b| *b == b',');
            ids.map(<[u8]>::trim_ascii)
        });
        if ids.any(|id| *id == self.id) {
            return Err(Error::BadRequest(
                "the request came through this proxy before: its upstream leads back to it",
            ));
        }
        Ok(())
    }

    /// The header for the next one: the ids that the request has, and then ours.
    pub fn next(&self, headers: &HeaderMap) -> (HeaderName, HeaderValue) {
        let mut ids = headers.get_all(HOP).iter().peekable();
        if ids.peek().is_none() {
            return (HOP, self.id.clone());
        }
        let ids: Vec<_> = ids.chain([&self.id]).map(HeaderValue::as_bytes).collect();
        let ids = HeaderValue::from_bytes(&ids.join(&b", "[..]));
        (HOP, ids.unwrap_or_else(|_| self.id.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(origin: &str) -> Option<Hop> {
        Hop::to(&origin.parse().unwrap())
    }

    #[test]
    fn only_an_upstream_on_this_machine_is_told() {
        for origin in ["http://127.0.0.1:5546", "https://localhost", "http://[::1]"] {
            assert!(hop(origin).is_some(), "{origin}");
        }
        for origin in ["https://api-singapore.klingai.com", "https://192.0.2.1"] {
            assert!(hop(origin).is_none(), "{origin}");
        }
    }

    #[test]
    fn our_id_follows_those_that_are_there_and_is_known_again() {
        let [first, second] = [(); 2].map(|()| hop("http://localhost").unwrap());
        let mut headers = HeaderMap::new();
        assert!(first.check(&headers).is_ok());
        let (name, value) = first.next(&headers);
        assert_eq!((&name, &value), (&HOP, &first.id));
        headers.insert(name, value);
        assert!(first.check(&headers).is_err());
        assert!(second.check(&headers).is_ok());
        headers.append(HOP, HeaderValue::from_static("another"));
        let (name, value) = second.next(&headers);
        let ids = [
            first.id.to_str().unwrap(),
            "another",
            second.id.to_str().unwrap(),
        ];
        assert_eq!(value, ids.join(", "));
        headers.insert(name, value);
        assert!(first.check(&headers).is_err() && second.check(&headers).is_err());
    }
}
