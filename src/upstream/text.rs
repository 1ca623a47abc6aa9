//! Decodes a copy of an encoded body, to read its text. The body that passes to the client is never decoded.

use std::io::{self, Write};

use flate2::write::{GzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;

/// Decodes a body as it arrives, and writes its text to `W`. Decoders are boxed, because most bodies are not
/// compressed.
pub enum Decoder<W: Write> {
    /// The body is not compressed.
    Plain(W),
    /// The body is compressed with `gzip`.
    Gzip(Box<GzDecoder<W>>),
    /// The body is compressed with `deflate`.
    Deflate(Box<ZlibDecoder<W>>),
    /// The body is in an encoding that is not read here.
    Opaque,
}

/// Decoder that keeps the beginning of a body's text, up to a limit.
pub(super) type Text = Decoder<Bounded>;

/// Takes bytes up to a limit and refuses the rest, which stops a decoder at a decompression bomb.
pub(super) struct Bounded {
    bytes: Vec<u8>,
    bound: usize,
}

// === impl Decoder ===

impl<W: Write> Decoder<W> {
    /// Creates a decoder that writes the text of a body with these headers to `text`.
    pub fn to(text: W, headers: &HeaderMap) -> Self {
        let mut encodings = headers.get_all(CONTENT_ENCODING).into_iter();
        match (
            encodings
                .next()
                .map(|value| value.as_bytes().to_ascii_lowercase()),
            encodings.next(),
        ) {
            (None, _) => Self::Plain(text),
            (Some(one), None) => match &*one {
                b"identity" | b"" => Self::Plain(text),
                b"gzip" | b"x-gzip" => Self::Gzip(GzDecoder::new(text).into()),
                b"deflate" => Self::Deflate(ZlibDecoder::new(text).into()),
                _ => Self::Opaque,
            },
            (Some(_), Some(_)) => Self::Opaque,
        }
    }

    /// Takes the next bytes of the body. Bytes that are not in the declared encoding, or that `W` refuses,
    /// are left out.
    pub fn push(&mut self, encoded: &[u8]) {
        let _ = match self {
            Self::Plain(text) => text.write_all(encoded),
            Self::Gzip(decoder) => decoder.write_all(encoded).and_then(|()| decoder.flush()),
            Self::Deflate(decoder) => decoder.write_all(encoded).and_then(|()| decoder.flush()),
            Self::Opaque => Ok(()),
        };
    }

    /// Returns the writer that gets the text; `None` if the encoding is not read here.
    pub fn get_ref(&self) -> Option<&W> {
        match self {
            Self::Plain(text) => Some(text),
            Self::Gzip(decoder) => Some(decoder.get_ref()),
            Self::Deflate(decoder) => Some(decoder.get_ref()),
            Self::Opaque => None,
        }
    }
}

impl Text {
    pub(super) fn new(headers: &HeaderMap, bound: usize) -> Self {
        let bytes = Vec::new();
        Self::to(Bounded { bytes, bound }, headers)
    }

    /// Returns the text that was decoded so far.
    pub(super) fn seen(&self) -> &[u8] {
        self.get_ref().map_or(&[], |text| &text.bytes)
    }

    /// Returns true if no more of the text will be kept.
    pub(super) fn is_full(&self) -> bool {
        self.get_ref().is_none_or(Bounded::is_full)
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
        // A writer that takes no bytes reports that it is full.
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
