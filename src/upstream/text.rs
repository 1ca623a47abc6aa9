//! A bounded look at the text inside an encoded body. What passes is never decoded.

use std::io::{self, Write};

use flate2::write::{GzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;

/// The beginning of a body's text, at most `bound` bytes of it. Most of it comes plain, so that only
/// that is small.
pub(super) enum Text {
    Plain(Bounded),
    Gzip(Box<GzDecoder<Bounded>>),
    Deflate(Box<ZlibDecoder<Bounded>>),
    /// In an encoding that is not read here.
    Opaque,
}

/// Takes bytes up to a bound and refuses those beyond, which stops a decoder at a bomb.
pub(super) struct Bounded {
    bytes: Vec<u8>,
    bound: usize,
}

// === impl Text ===

impl Text {
    pub(super) fn new(headers: &HeaderMap, bound: usize) -> Self {
        let bounded = Bounded {
            bytes: Vec::new(),
            bound,
        };
        let mut encodings = headers.get_all(CONTENT_ENCODING).into_iter();
        match (
            encodings
                .next()
                .map(|value| value.as_bytes().to_ascii_lowercase()),
            encodings.next(),
        ) {
            (None, _) => Self::Plain(bounded),
            (Some(one), None) => match &*one {
                b"identity" | b"" => Self::Plain(bounded),
                b"gzip" | b"x-gzip" => Self::Gzip(GzDecoder::new(bounded).into()),
                b"deflate" => Self::Deflate(ZlibDecoder::new(bounded).into()),
                _ => Self::Opaque,
            },
            (Some(_), Some(_)) => Self::Opaque,
        }
    }

    /// Takes the next bytes of the body. Those that are over the bound or not in the encoding that
    /// the headers name leave the text as it is.
    pub(super) fn push(&mut self, encoded: &[u8]) {
        let _ = match self {
            Self::Plain(text) => text.write_all(encoded),
            Self::Gzip(decoder) => decoder.write_all(encoded).and_then(|()| decoder.flush()),
            Self::Deflate(decoder) => decoder.write_all(encoded).and_then(|()| decoder.flush()),
            Self::Opaque => Ok(()),
        };
    }

    /// The text so far.
    pub(super) fn seen(&self) -> &[u8] {
        match self {
            Self::Plain(text) => &text.bytes,
            Self::Gzip(decoder) => &decoder.get_ref().bytes,
            Self::Deflate(decoder) => &decoder.get_ref().bytes,
            Self::Opaque => &[],
        }
    }

    /// Whether no more of it will be kept.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Self::Plain(text) => text.is_full(),
            Self::Gzip(decoder) => decoder.get_ref().is_full(),
            Self::Deflate(decoder) => decoder.get_ref().is_full(),
            Self::Opaque => true,
        }
    }
}

// === impl Bounded ===

impl Bounded {
    fn is_full(&self) -> bool {
        self.bytes.len() >= self.bound
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.bound - self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..taken]);
        // Nothing taken is how a writer says that it is full.
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn encoded_as(encoding: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_ENCODING, encoding.parse().unwrap())])
    }

    #[test]
    fn a_gzip_bomb_is_read_to_the_bound_only() {
        let mut text = Text::new(&encoded_as("gzip"), 1024);
        text.push(&gzip(&vec![b'a'; 10 << 20]));
        assert_eq!((text.seen().len(), text.is_full()), (1024, true));
    }

    #[test]
    fn a_text_is_read_however_its_bytes_arrive() {
        let bytes = gzip(b"{\"code\":1303}");
        let mut text = Text::new(&encoded_as("GZIP"), 1024);
        for byte in bytes {
            text.push(&[byte]);
        }
        assert_eq!(text.seen(), b"{\"code\":1303}");
    }

    #[test]
    fn what_is_not_in_the_named_encoding_is_no_text() {
        for encoding in ["gzip", "deflate", "br", "gzip, br"] {
            let mut text = Text::new(&encoded_as(encoding), 1024);
            text.push(b"{\"code\":1303}");
            assert_eq!(text.seen(), b"", "{encoding}");
        }
    }
}
