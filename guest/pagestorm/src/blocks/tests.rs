use super::*;

#[test]
fn a_block_survives_packing() {
    for content in [Content::Unknown, Content::Data, Content::Zeros] {
        for generation in [0, 1, GENERATION] {
            let block = Block {
                content,
                generation,
            };
            assert_eq!(Block::unpack(block.pack()), block);
        }
    }
    assert_eq!(
        Block::unpack(0),
        Block {
            content: Content::Unknown,
            generation: 0
        }
    );
    assert_eq!(Block::unpack(5).written().generation, 6);
}
