//! HTTP/2 frames, read and written by hand (RFC 9113, section 4.1).

use std::io::{self, Read};

/// Bytes that a client sends before its first frame (section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Error codes of HTTP/2 (section 7).
pub const NO_ERROR: u32 = 0;
pub const INTERNAL_ERROR: u32 = 2;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;

/// Identifiers of settings (section 6.5.2).
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// Types of frames (section 6).
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// HTTP/2 frame of any type.
pub struct Frame {
    pub kind: u8,
    flags: u8,
    pub stream: u32,
    payload: Vec<u8>,
}

// === impl Frame ===

impl Frame {
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 9];
        from.read_exact(&mut head)?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        from.read_exact(&mut payload)?;
        Ok(Self {
            kind,
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes(stream) & (u32::MAX >> 1),
            payload,
        })
    }

    pub fn settings(settings: &[(u16, u32)]) -> Self {
        let pair = |(key, value): &(u16, u32)| {
            let mut pair = key.to_be_bytes().to_vec();
            pair.extend(value.to_be_bytes());
            pair
        };
        Self::new(SETTINGS, 0, 0, settings.iter().flat_map(pair).collect())
    }

    /// Returns the head of a response, with each header as a literal (RFC 7541, section 6.2.2).
    pub fn answer(stream: u32, status: u16, headers: &[(&str, &str)]) -> Self {
        let status = status.to_string();
        let mut block = Vec::new();
        for (name, value) in [(":status", &*status)].iter().chain(headers) {
            block.push(0);
            for text in [name, value] {
                let length = u8::try_from(text.len()).expect("a short text");
                assert!(
                    length < 127,
                    "longer texts need more bytes for their length"
                );
                block.push(length);
                block.extend(text.bytes());
            }
        }
        Self::new(HEADERS, END_HEADERS, stream, block)
    }

    pub fn data(stream: u32, data: &[u8], end: bool) -> Self {
        let flags = if end { END_STREAM } else { 0 };
        Self::new(DATA, flags, stream, data.to_vec())
    }

    pub fn reset(stream: u32, code: u32) -> Self {
        Self::new(RST_STREAM, 0, stream, code.to_be_bytes().to_vec())
    }

    /// Returns a GOAWAY without an error: streams above `last` were not processed and will not be.
    pub fn go_away(last: u32) -> Self {
        let payload = [last, NO_ERROR].map(u32::to_be_bytes).concat();
        Self::new(GOAWAY, 0, 0, payload)
    }

    /// Opens the window by `more` bytes. Stream 0 is the whole connection.
    pub fn window_update(stream: u32, more: u32) -> Self {
        Self::new(WINDOW_UPDATE, 0, stream, more.to_be_bytes().to_vec())
    }

    /// Returns the bytes by which the peer opens the window (`WINDOW_UPDATE`).
    pub fn increment(&self) -> u32 {
        let increment = self.payload.first_chunk().expect("an increment");
        u32::from_be_bytes(*increment)
    }

    /// Returns the value of one setting in a SETTINGS frame.
    pub fn setting(&self, wanted: u16) -> Option<u32> {
        let (pairs, _) = self.payload.as_chunks::<6>();
        let mut pairs = pairs
            .iter()
            .map(|[a, b, value @ ..]| (u16::from_be_bytes([*a, *b]), u32::from_be_bytes(*value)));
        pairs.find_map(|(key, value)| (key == wanted).then_some(value))
    }

    /// Returns a PING, which the peer must send back (section 6.7).
    pub fn ping() -> Self {
        Self::new(PING, 0, 0, vec![0; 8])
    }

    /// Acknowledges this SETTINGS or PING frame. A PING is sent back with its payload.
    pub fn ack(&self) -> Self {
        let payload = match self.kind {
            PING => self.payload.clone(),
            _ => Vec::new(),
        };
        Self::new(self.kind, ACK, 0, payload)
    }

    pub fn is_ack(&self) -> bool {
        self.flags & ACK != 0
    }

    pub fn ends_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }

    pub fn ends_headers(&self) -> bool {
        self.flags & END_HEADERS != 0
    }

    /// Returns the bytes that count against the windows: the whole payload, with padding (section 6.9.1).
    pub fn size(&self) -> u32 {
        u32::try_from(self.payload.len()).expect("three bytes of length")
    }

    /// Returns the data without padding.
    pub fn content(&self) -> &[u8] {
        if self.flags & PADDED == 0 {
            return &self.payload;
        }
        let (padding, rest) = self.payload.split_first().expect("a length of the padding");
        &rest[..rest.len() - usize::from(*padding)]
    }

    /// Returns the error code of `RST_STREAM`.
    pub fn code(&self) -> u32 {
        let code = self.payload.first_chunk().expect("an error code");
        u32::from_be_bytes(*code)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let [_, length @ ..] = self.size().to_be_bytes();
        let stream = self.stream.to_be_bytes();
        [
            &length,
            &[self.kind, self.flags][..],
            &stream,
            &self.payload,
        ]
        .concat()
    }

    fn new(kind: u8, flags: u8, stream: u32, payload: Vec<u8>) -> Self {
        Self {
            kind,
            flags,
            stream,
            payload,
        }
    }
}
