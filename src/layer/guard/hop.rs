//! Detects a loop of proxies in its first round. If upstream is on this machine, it may be this proxy
//! itself, or another proxy whose upstream is this one. A request would then go round for ever.

use http::header::Entry;
use http::{HeaderMap, HeaderValue};

use crate::error::Error;
use crate::request::headers::HOP;
use crate::request::id::RequestId;
use crate::upstream::Origin;

/// Mark of a proxy that may be part of a loop.
pub struct Hop {
    /// Random id of this process.
    id: HeaderValue,
}

// === impl Hop ===

impl Hop {
    /// Makes a mark for a proxy with this upstream. Returns `None` if upstream is not on this machine,
    /// so that foreign servers learn nothing of the proxy.
    pub fn to(origin: &Origin) -> Option<Self> {
        origin.loopback_port().map(|_| Self {
            id: RequestId::random().into_value(),
        })
    }

    /// Adds the id of this process to those that the request carries.
    ///
    /// # Errors
    ///
    /// [`Error::BadRequest`] if the id is already present: the request has passed through this proxy
    /// before.
    pub fn mark(&self, headers: &mut HeaderMap) -> Result<(), Error> {
        let mut ids = match headers.entry(HOP) {
            Entry::Vacant(entry) => {
                entry.insert(self.id.clone());
                return Ok(());
            }
            Entry::Occupied(ids) => ids,
        };
        let is_ours = |id: &[u8]| *id.trim_ascii() == *self.id.as_bytes();
        let mut before = ids
            .iter()
            .flat_map(|ids| ids.as_bytes().split(|b| *b == b','));
        if before.any(is_ours) {
            return Err(Error::BadRequest(
                "the request came through this proxy before: its upstream leads back to it",
            ));
        }
        ids.append(self.id.clone());
        Ok(())
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
        headers.insert(HOP, HeaderValue::from_static("a, b"));
        for hop in [&first, &second] {
            assert!(hop.mark(&mut headers).is_ok());
            assert!(hop.mark(&mut headers).is_err());
        }
        assert!(first.mark(&mut headers).is_err());
        let ids: Vec<_> = headers.get_all(HOP).iter().collect();
        assert_eq!(
            ids,
            [
                "a, b",
                first.id.to_str().unwrap(),
                second.id.to_str().unwrap()
            ]
        );
        let joined = format!("a,{}", first.id.to_str().unwrap());
        headers.insert(HOP, joined.parse().unwrap());
        assert!(first.mark(&mut headers).is_err());
    }
}
