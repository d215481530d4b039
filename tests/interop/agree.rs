// SPDX-License-Identifier: Apache-2.0
//! Reads and writes images with Fortanix's `sgxs` crate and says what it sees, one `name value`
//! per line.
//!
//!   agree image FILE.sgxs
//!   agree sigstruct FILE.sig
//!   agree write FILE.sgxs       an image of its own, through CanonicalSgxsWriter
use std::fs::File;
use std::io::{BufReader, Cursor};

use openssl::bn::BigNum;
use openssl::hash::Hasher;
use openssl::rsa::Rsa;
use sgx_isa::{PageType, SecinfoFlags};
use sgxs::sgxs::{
    CanonicalSgxsWriter, MeasECreate, PageChunk, PageChunks, PageReader, SecinfoTruncated, SgxsWrite,
};
use sgxs::sigstruct::{self, EnclaveHash};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{:02x}", byte)).collect()
}

fn open(path: &str) -> BufReader<File> {
    BufReader::new(File::open(path).expect("cannot open the input"))
}

fn image(path: &str) {
    let hash = EnclaveHash::from_stream::<_, Hasher>(&mut open(path)).expect("cannot be measured");
    println!("mrenclave {}", hex(&hash.hash()));
    let mut file = open(path);
    let (create, mut pages) = PageReader::new(&mut file).expect("not canonical");
    assert!(create.sized);
    // Copies: the structure is packed.
    let (size, ssa_frame_pages) = (create.ecreate.size, create.ecreate.ssaframesize);
    println!("size {}\nssa_frame_pages {}", size, ssa_frame_pages);
    let (mut count, mut tcs, mut measured) = (0, 0, 0u64);
    while let Some((eadd, PageChunks(chunks), _)) = pages.read_page().expect("not canonical") {
        count += 1;
        tcs += (eadd.secinfo.flags.page_type() == PageType::Tcs as u8) as u64;
        measured += 256 * chunks.count_ones() as u64;
    }
    println!("pages {}\ntcs {}\nmeasured {}", count, tcs, measured);
}

fn sigstruct(path: &str) {
    let sig = sigstruct::read(&mut open(path)).expect("cannot be read");
    let mut modulus = sig.modulus.to_vec();
    modulus.reverse();
    let key = Rsa::from_public_components(
        BigNum::from_slice(&modulus).unwrap(),
        BigNum::from_u32(sig.exponent).unwrap(),
    )
    .unwrap();
    let verified = sigstruct::verify::<_, Hasher>(&sig, &*key).is_ok();
    println!("verified {}\nenclavehash {}", verified, hex(&sig.enclavehash));
    println!("isvprodid {}\nisvsvn {}", sig.isvprodid, sig.isvsvn);
    println!("attributes {:?}", sig.attributes.flags.bits());
    println!("xfrm {}", sig.attributes.xfrm);
}

fn write(path: &str) {
    let mut file = File::create(path).expect("cannot write");
    let ecreate = MeasECreate { size: 0x10000, ssaframesize: 1, ..Default::default() };
    let mut writer = CanonicalSgxsWriter::new(&mut file, ecreate, true).unwrap();
    let rw = || SecinfoTruncated { flags: SecinfoFlags::R | SecinfoFlags::W | PageType::Reg.into() };
    let text = SecinfoTruncated { flags: SecinfoFlags::R | SecinfoFlags::X | PageType::Reg.into() };
    let page = vec![0x5a; 4096];
    writer.write_page(Some(&mut Cursor::new(&page)), Some(0), text).unwrap();
    let mut chunks = [PageChunk::Skipped; 16];
    chunks[3] = PageChunk::IncludedMeasured;
    chunks[7] = PageChunk::Included;
    writer.write_page((&mut Cursor::new(&page), chunks), Some(0x1000), rw()).unwrap();
    writer.write_pages::<Cursor<&[u8]>>(None, 4, Some(0x4000), rw()).unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match (arguments[1].as_str(), arguments[2].as_str()) {
        ("image", path) => image(path),
        ("sigstruct", path) => sigstruct(path),
        ("write", path) => write(path),
        _ => panic!("usage: agree image|sigstruct|write FILE"),
    }
}
