//! JPEG's quality, from 1 to 100, as other programs count it: by what each coefficient is divided.

/// Of luminance and of chrominance, row by row, at quality 50 (ITU-T T.81, tables K.1 and K.2).
const HALF: [[u32; 64]; 2] = [
    [
        16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
        51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121,
        120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
    ],
    [
        17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99,
        99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99, 99,
        99, 99, 99, 99, 99, 99, 99, 99,
    ],
];

/// The tables of luminance and of chrominance at a quality, row by row, scaled as libjpeg does (`jpeg_quality_scaling`).
pub(super) fn tables(quality: u8) -> [[u32; 64]; 2] {
    let quality = u32::from(quality.clamp(1, 100));
    let percent = if quality < 50 { 5000 / quality } else { 200 - 2 * quality };
    HALF.map(|table| table.map(|step| ((step * percent + 50) / 100).clamp(1, 255)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::jpeg;

    /// Where the k-th coefficient of a JPEG file is, row by row.
    fn zigzag() -> Vec<usize> {
        let mut places: Vec<(usize, usize)> = (0..64).map(|n| (n / 8, n % 8)).collect();
        places.sort_by_key(|&(row, column)| {
            let (diagonal, up) = (row + column, (row + column) % 2 == 0);
            (diagonal, if up { column } else { row })
        });
        places.into_iter().map(|(row, column)| 8 * row + column).collect()
    }

    #[test]
    fn they_are_those_of_another_encoder() {
        for quality in [1, 10, 49, 50, 51, 75, 90, 95, 100] {
            let file = jpeg::encode(&[99; 3 * 64], 8, 8, quality).unwrap();
            let mut found = Vec::new();
            let mut at = 2;
            while file[at + 1] != 0xda {
                let length = usize::from(u16::from_be_bytes([file[at + 2], file[at + 3]]));
                if file[at + 1] == 0xdb {
                    found.extend(file[at + 4..at + 2 + length].chunks(65).map(|table| table[1..].to_vec()));
                }
                at += 2 + length;
            }
            let own = tables(quality).map(|table| zigzag().into_iter().map(|k| table[k] as u8).collect::<Vec<_>>());
            assert_eq!(found, own, "quality {quality}");
        }
    }
}
