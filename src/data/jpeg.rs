//! One frame to and from JPEG (baseline, in plain Rust: no C library is involved).

use jpeg_encoder::{ColorType, Encoder};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::{Error, Result};

/// Encodes one RGB frame `[height, width, 3]` at `quality` 1..=100.
///
/// From quality 90 on colour keeps its full resolution; below, it is halved (4:2:0).
///
/// # Errors
/// [`Error::Input`] when the frame's length does not fit its size, or a side exceeds JPEG's 65535.
pub fn encode(rgb: &[u8], height: usize, width: usize, quality: u8) -> Result<Vec<u8>> {
    let (Ok(h), Ok(w)) = (u16::try_from(height), u16::try_from(width)) else {
        return Err(Error::input(format!("a {height}x{width} frame is too large for JPEG (65535 pixels a side)")));
    };
    if rgb.len() != height * width * 3 {
        return Err(Error::input(format!("a {height}x{width} frame in colour has {} bytes", rgb.len())));
    }
    let mut out = Vec::with_capacity(rgb.len() / 8 + 1024);
    let encoded = Encoder::new(&mut out, quality).encode(rgb, w, h, ColorType::Rgb);
    encoded.map_err(|e| Error::Run(format!("JPEG encoder: {e}")))?;
    Ok(out)
}

/// Decodes a JPEG frame into `out` = RGB `[height, width, 3]`. On failure says what is wrong with the frame; the
/// caller adds which one it was.
pub fn decode(jpeg: &[u8], height: usize, width: usize, out: &mut [u8]) -> std::result::Result<(), String> {
    let mut decoder = checked_headers(jpeg, height, width)?;
    decoder.decode_into(out).map_err(|e| format!("damaged JPEG: {e:?}"))
}

/// Decodes a JPEG frame for what [`decode`] would say of it.
pub fn decode_and_forget(jpeg: &[u8], height: usize, width: usize) -> std::result::Result<(), String> {
    thread_local! { static PIXELS: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) }; }
    PIXELS.with_borrow_mut(|pixels| {
        pixels.resize(height * width * 3, 0);
        decode(jpeg, height, width, pixels)
    })
}

fn checked_headers(
    jpeg: &[u8],
    height: usize,
    width: usize,
) -> std::result::Result<JpegDecoder<ZCursor<&[u8]>>, String> {
    // Strict: a frame that ends early is an error, not a frame with a grey lower half.
    let options = DecoderOptions::new_fast().set_strict_mode(true).jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(jpeg), options);
    decoder.decode_headers().map_err(|e| format!("damaged JPEG: {e:?}"))?;
    match decoder.info() {
        Some(info) if usize::from(info.height) == height && usize::from(info.width) == width => Ok(decoder),
        Some(info) => Err(format!("the JPEG is {}x{}, the shard says {height}x{width} (HxW)", info.height, info.width)),
        None => Err("damaged JPEG: no image header".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_is_close_and_wrong_sizes_and_damage_are_told() {
        let (h, w) = (24, 33);
        let smooth: Vec<u8> = (0..h * w * 3).map(|i| ((i / 3 % w) * 4 + (i / 3 / w) * 2 + i % 3 * 20) as u8).collect();
        let coded = encode(&smooth, h, w, 95).unwrap();
        let mut back = vec![0; h * w * 3];
        decode(&coded, h, w, &mut back).unwrap();
        let worst = smooth.iter().zip(&back).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 12, "worst difference {worst}");
        assert!(decode(&coded, w, h, &mut back).unwrap_err().contains("33x24"));
        assert!(decode(&coded[..coded.len() / 2], h, w, &mut back).is_err());
        assert!(decode(b"", h, w, &mut back).is_err());
        assert!(decode(&[0; 100], h, w, &mut back).is_err());
        assert!(encode(&smooth, h, w + 1, 95).is_err());
        assert!(encode(&smooth, 1 << 20, w, 95).is_err());
    }
}
